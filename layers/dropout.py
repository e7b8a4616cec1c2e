"""Dropout with the key passed in."""

import jax
import jax.numpy as jnp

from layers.typing import Array, Float, Key


def dropout(
    x: Float[Array, "*s"], rate: float, key: Key[Array, ""] | None, *, shared_axes: tuple[int, ...] = ()
) -> Float[Array, "*s"]:
    """Zeroes elements with probability `rate` and scales the rest by 1 / (1 - rate); the identity without a key.

    `shared_axes` names axes along which one draw is used, such as time ("tied" dropout of S4 and S5).
    """
    if key is None or rate == 0.0:
        return x
    shape = tuple(
        1 if axis in {a % x.ndim for a in shared_axes} else size for axis, size in enumerate(x.shape)
    )
    keep = jax.random.bernoulli(key, 1.0 - rate, shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)
