"""Queries and keys of norm 1, as the kernels of `delta_rule` take them."""

import jax
import jax.numpy as jnp


def normalized(x: jax.Array) -> jax.Array:
    """Returns x / sqrt(sum x^2 + 1e-6) over the last axis, computed in float32 and in the type of x."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)
