"""What the Hopper kernels of `delta_rule` share: masks, decays and copies of a chunk.

A chunk is CHUNK tokens. The numbers that a kernel needs per token besides q, k and v are rows of one array `vectors`
(b, h, chunks, rows, CHUNK), float32.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels import mosaic_gpu
from layers.kernels.mosaic_gpu import pl, plgpu

CHUNK = 64
SQUARE = (CHUNK, CHUNK)
PROCESSORS = 132  # of an H100
BLOCK = 64  # value features per warpgroup

# Rows of `vectors`: the sum of log-decay from the start of the chunk, beta, the decay from the state that enters the chunk,
# the decay to the state that leaves it, and, with segments, the segment number.
DECAY, BETA, READ, WRITE, SEGMENT = range(5)


class Sizes(NamedTuple):
    """The sizes of a call: rows, tokens, heads of the values, features of keys and of values."""

    batch: int
    time: int
    heads: int
    key_dim: int
    value_dim: int

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.time, CHUNK)

    @property
    def blocks(self) -> int:
        return self.value_dim // BLOCK

    def shared(self, head: Any, count: int) -> Any:
        """The index, among `count` heads that several heads of the values share, of the one that `head` uses."""
        return jax.lax.div(head, self.heads // count)


def sizes_of(k: jax.Array, v: jax.Array) -> Sizes:
    """Returns the sizes of k (b, t, g, k) and v (b, t, h, v)."""
    batch, time, heads, value_dim = v.shape
    return Sizes(batch, time, heads, k.shape[-1], value_dim)


def read(ref: Any) -> jax.Array:
    """A tile of shared memory in float32 registers, laid out as the result of a product."""
    return mosaic_gpu.in_registers(ref).astype(jnp.float32)


def by_row(ref: Any) -> jax.Array:
    """A vector with one token per row of a tile."""
    return mosaic_gpu.along(ref, 0)


def by_column(ref: Any) -> jax.Array:
    """A vector with one token per column of a tile."""
    return mosaic_gpu.along(ref, 1)


def along_rows(vector: jax.Array, width: int = CHUNK) -> jax.Array:
    """(c) from `by_row` to (c, width)."""
    return mosaic_gpu.spread(vector, 0, (vector.shape[0], width))


def along_columns(vector: jax.Array, height: int = CHUNK) -> jax.Array:
    """(c) from `by_column` to (height, c)."""
    return mosaic_gpu.spread(vector, 1, (height, vector.shape[0]))


def indices() -> tuple[jax.Array, jax.Array]:
    """The row and the column of every entry of a square tile."""
    return mosaic_gpu.indices(SQUARE, 0), mosaic_gpu.indices(SQUARE, 1)


def visible(vectors: Any, mask: jax.Array) -> jax.Array:
    """The mask without pairs of tokens of different segments.

    Args:
      vectors: (2, kinds, c), two copies: the compiler merges two loads of one vector, which then have one layout.
    """
    if vectors.shape[1] <= SEGMENT:
        return mask
    rows, columns = (
        along_rows(by_row(vectors.at[0, SEGMENT])),
        along_columns(by_column(vectors.at[1, SEGMENT])),
    )
    return mask & (rows == columns)


def decay_matrix(vectors: Any, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """The decay from the column's token to the row's, zero if the column's comes later or is in another segment.

    Args:
      vectors: see `visible`.
    """
    between = along_rows(by_row(vectors.at[0, DECAY])) - along_columns(by_column(vectors.at[1, DECAY]))
    seen = visible(vectors, rows >= columns)
    return jnp.where(seen, jnp.exp(jnp.where(seen, jnp.minimum(between, 0.0), 0.0)), 0.0)


def in_turn(chunks: int, most: int) -> int:
    """Returns how many chunks a program takes in turn: few enough that every multiprocessor has several programs."""
    return max(1, min(most, chunks // (4 * PROCESSORS)))


def fetch(pairs: Sequence[tuple[Any, Any]], barrier: Any) -> None:
    """Starts copies into shared memory; `barrier` counts them."""
    for source, target in pairs:
        plgpu.copy_gmem_to_smem(source, target, barrier)


def send(pairs: Sequence[tuple[Any, Any]]) -> None:
    """Starts copies out of shared memory, as one group, of what all lanes have written."""
    plgpu.commit_smem()
    for source, target in pairs:
        plgpu.copy_smem_to_gmem(source, target, commit_group=False)
    plgpu.commit_smem_to_gmem_group()


def wait_to_send(kinds: int) -> None:
    """Waits until the oldest copy has left and its place is free again, where `kinds` sends take turns."""
    plgpu.wait_smem_to_gmem(kinds - 1, wait_read_only=True)
