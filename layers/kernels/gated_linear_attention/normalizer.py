"""The division by the sum of weights: the sum is the output for one more feature of the values, which is 1."""

import jax
import jax.numpy as jnp


def with_ones(v: jax.Array) -> jax.Array:
    """Returns v (b, t, h, v) with the feature that gives the sums, (b, t, h, v + 1)."""
    return jnp.pad(v, ((0, 0),) * 3 + ((0, 1),), constant_values=1)


def divided(sums: jax.Array, smallest: float) -> jax.Array:
    """Returns weighted sums of values divided by those of weights, the last feature of `sums`.

    Args:
      sums: (b, t, h, v + 1), float32 or wider.
      smallest: what replaces denominators that are nearer to zero, with their sign kept.
    """
    denominator = sums[..., -1:]
    small = jnp.abs(denominator) < smallest
    safe = jnp.where(small, jnp.where(denominator < 0, -smallest, smallest), denominator)
    return sums[..., :-1] / safe
