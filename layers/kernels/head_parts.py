"""Value heads of any size as several narrow ones, for kernels that take heads of a bounded size.

A step of linear attention or of the delta rule treats the features of the values alike and independently: a column of the
state depends on one feature and on queries, keys and decays. A head of v features is therefore as many heads as one likes
that share these and divide the features, without any loss. Keys do not divide like that: the delta rule mixes them, and
where the state is a plain sum of k v^T, outputs are sums over parts of the keys.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 64  # features that one warpgroup takes
WIDEST = 128  # features per head that the kernels take


class Parts(NamedTuple):
    """A head of values as `count` heads of `width` features, the last of which are padding."""

    count: int
    width: int


def value_parts(features: int) -> Parts:
    """Returns the parts of a value head with the fewest features: as wide as kernels take, or one block if those are odd."""
    blocks = -(-features // BLOCK)
    if blocks <= WIDEST // BLOCK:
        return Parts(1, blocks * BLOCK)
    return Parts(blocks // 2, WIDEST) if blocks % 2 == 0 else Parts(blocks, BLOCK)


def key_parts(features: int) -> list[slice]:
    """Returns the features of every part of a key head: as many as kernels take, and the rest."""
    return [slice(start, min(start + WIDEST, features)) for start in range(0, features, WIDEST)]


def split(v: jax.Array, parts: Parts) -> jax.Array:
    """(b, t, h, v) to (b, t, h p, w), padded with zeros; the parts of a head are neighbours."""
    v = padded(v, parts.count * parts.width)
    return v.reshape(*v.shape[:2], -1, parts.width)


def join(o: jax.Array, parts: Parts, features: int) -> jax.Array:
    """(b, t, h p, w) to (b, t, h, v); undoes `split`."""
    return o.reshape(*o.shape[:2], -1, parts.count * parts.width)[..., :features]


def split_state(state: jax.Array, parts: Parts) -> jax.Array:
    """(b, h, k, v) to (b, h p, k, w), as `split` does with values."""
    state = padded(state, parts.count * parts.width)
    batch, heads, keys, _ = state.shape
    state = state.reshape(batch, heads, keys, *parts).swapaxes(2, 3)
    return state.reshape(batch, heads * parts.count, keys, parts.width)


def join_state(state: jax.Array, parts: Parts, features: int) -> jax.Array:
    """(b, h p, k, w) to (b, h, k, v); undoes `split_state`."""
    batch, _, keys, _ = state.shape
    state = state.reshape(batch, -1, parts.count, keys, parts.width).swapaxes(2, 3)
    return state.reshape(batch, -1, keys, parts.count * parts.width)[..., :features]


def padded(x: jax.Array, features: int) -> jax.Array:
    """Returns x with zeros up to so many features on the last axis."""
    missing = features - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x
