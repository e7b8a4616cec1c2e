"""Blocks of tokens by their positions, where rows are packed or come from a cache."""

import jax
import jax.numpy as jnp

from layers.kernels.sizes import in_chunks
from layers.parts.blocks import in_blocks
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


def block_means(
    numbers: Int[Array, "b s"], places: Int[Array, "b s"], *arrays: Float[Array, "b s g k"]
) -> tuple[
    Int[Array, "b s"], tuple[Float[Array, "b s g k"], ...], tuple[Int[Array, "b s"], Int[Array, "b s"]]
]:
    """Returns the block of each token, means over the blocks of the row, float32, and the segments and places of the blocks.

    Args:
      numbers, places: as in `block_index`.
      arrays: what to average. Where there is no block, means are 0, and segments and places -1.
    """
    (b, s), index = numbers.shape, block_index(numbers, places)
    row = jnp.arange(b, dtype=jnp.int32)[:, None]
    count = jnp.zeros((b, s + 1), jnp.float32).at[row, index].add(1.0)[:, :s]
    means = []
    for x in arrays:
        sums = jnp.zeros((b, s + 1, *x.shape[2:]), jnp.float32).at[row, index].add(x.astype(jnp.float32))
        means.append(sums[:, :s] / jnp.maximum(count, 1.0)[..., None, None])
    blocks = tuple(
        jnp.full((b, s + 1), -1, jnp.int32).at[row, index].set(x)[:, :s] for x in (numbers, places)
    )
    return index, tuple(means), blocks


def row_block_means(x: Float[Array, "b t g k"], size: int) -> Float[Array, "b n g k"]:
    """Returns means over blocks of `size` tokens of whole rows, float32; the last one as if zeros filled it."""
    return in_blocks(x, size).astype(jnp.float32).mean(2)


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
