"""Blocks of tokens by their positions, where rows are packed or come from a cache."""

import jax
import jax.numpy as jnp

from layers.kernels.sizes import in_chunks
from layers.segments import Segments
from layers.typing import Array, Float, Int


def numbers_and_positions(
    x: Float[Array, "b t d"], segments: Segments | None
) -> tuple[Int[Array, "b t"], Int[Array, "b t"]]:
    """Returns the number of the segment of each token, 0 for padding, and its position there; whole rows are segment 1."""
    if segments is not None:
        return segments.numbers, segments.positions
    index = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None], x.shape[:2])
    return jnp.ones_like(index), index


def block_index(numbers: Int[Array, "b s"], places: Int[Array, "b s"]) -> Int[Array, "b s"]:
    """Returns the block of each token, counted along the row, and s for padding and empty slots.

    Args:
      numbers: segments of the tokens, 0 for none.
      places: the blocks in their segments, in order along the row.
    """
    s, real = numbers.shape[1], numbers != 0
    last = jax.lax.cummax(jnp.where(real, jnp.arange(s, dtype=jnp.int32)[None], -1), axis=1)
    before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=-1)

    def changes(x):
        return x != jnp.take_along_axis(x, jnp.maximum(before, 0), axis=1)

    new = real & ((before < 0) | changes(numbers) | changes(places))
    return jnp.where(real, jnp.cumsum(new, axis=1, dtype=jnp.int32) - 1, s)


def some_at_a_time(attend, size: int, *queries: Array) -> Array:
    """Returns attend(*queries) of arrays (b, t, ...), for `size` queries at a time, recomputed in the backward pass."""
    t = queries[0].shape[1]
    if t <= size:
        return attend(*queries)
    padded = in_chunks(t, size)

    def cut(x):
        x = jnp.pad(x, [(0, padded - t if axis == 1 else 0) for axis in range(x.ndim)])
        return jnp.moveaxis(x.reshape(x.shape[0], padded // size, size, *x.shape[2:]), 1, 0)

    o = jax.lax.map(lambda some: jax.checkpoint(attend)(*some), tuple(map(cut, queries)))
    return jnp.moveaxis(o, 0, 1).reshape(o.shape[1], padded, *o.shape[3:])[:, :t]
