"""What the kernels for TPUs share that walk over chunks of a linear recurrence of matrices: masks, decays and products.

`settings` has the fields `chunk`, the steps per chunk c, and `dtype`, the type of the operands of products.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from layers.kernels.mosaic_tpu import column


def segment_numbers(settings, segments, missing):
    """(b, n, 2, c): the segment number per step, 0 for padding; row 1 holds that of the state entering the chunk."""
    if segments is None or not segments.packed:
        return ()
    number = jnp.pad(segments.numbers, ((0, 0), (0, missing)))
    number = number.reshape(number.shape[0], -1, settings.chunk)
    leaving = jnp.maximum(jax.lax.cummax(number.max(2), axis=1), 1)
    entering = jnp.pad(leaving, ((0, 0), (1, 0)), constant_values=1)[:, :-1]
    entering = jnp.broadcast_to(entering[:, :, None], number.shape)
    return (jnp.stack([number, entering], axis=2).astype(jnp.float32),)


class Masks(NamedTuple):
    """Which steps of a chunk see which.

    Attributes:
      seen: which j each i sees, (c, c).
      reads, writes: which steps read the entering state and write the leaving state, (c, 1).
      keeps: whether the state passes through the chunk, (1, 1).
      row: segment numbers, 0 for padding, (1, c), or None.
    """

    seen: jax.Array
    reads: jax.Array
    writes: jax.Array
    keeps: jax.Array
    row: jax.Array | None


def masks_of(settings, n, numbers):
    """The `Masks` of chunk n of a block; `numbers` is what `segment_numbers` returns, by blocks."""
    seen = pairs(settings.chunk, jnp.greater_equal)
    if not numbers:
        every = jnp.ones((settings.chunk, 1), bool)
        return Masks(seen, every, every, jnp.ones((1, 1), bool), None)
    row, entering = numbers[0][n][:1], numbers[0][n][1:, :1]
    own, leaving = column(row), jnp.maximum(entering, row.max(axis=1, keepdims=True))
    seen &= (own == row) & (row != 0)
    return Masks(seen, own == entering, own == leaving, entering == leaving, row)


class Decay(NamedTuple):
    """The decays of one head in a chunk.

    Attributes:
      weights: a scale times the decay from j to i, 0 for pairs that do not see each other, (c, c).
      read: the scale times the decay from the start to each step, 0 where the state is not seen, (c, 1).
      write: the decay from each step to the end, 0 where it does not reach the end, (c, 1).
      keep: the decay over all steps, (1, 1).
    """

    weights: jax.Array
    read: jax.Array
    write: jax.Array
    keep: jax.Array


def decay_of(settings, row, masks, scale):
    """The `Decay` of log-decays (1, c), or of none if row is None."""
    if row is None:
        return Decay(
            jnp.where(masks.seen, scale, 0.0),
            jnp.where(masks.reads, scale, 0.0),
            masks.writes.astype(jnp.float32),
            masks.keeps.astype(jnp.float32),
        )
    if masks.row is not None:
        row = jnp.where(masks.row == 0, 0, row)
    past = pairs(settings.chunk, jnp.greater_equal)
    upto, after = jnp.where(past, row, 0), jnp.where(past, 0, row)
    between = sums(settings, upto, pairs(settings.chunk, jnp.greater))
    return Decay(
        jnp.where(masks.seen, scale * jnp.exp(between), 0),
        jnp.where(masks.reads, scale * jnp.exp(upto.sum(axis=1, keepdims=True)), 0),
        jnp.where(masks.writes, jnp.exp(after.sum(axis=1, keepdims=True)), 0),
        jnp.where(masks.keeps, jnp.exp(row.sum(axis=1, keepdims=True)), 0),
    )


def decay_gradient(settings, dscores, dreads, dwrites, dkeep):
    """The gradient of log-decay, (1, c), from those of the exponents: of scores, reads, writes and the whole chunk.

    Step t collects the scores of all pairs j < t <= i, the reads of all i >= t and the writes of all j < t.
    """
    past, before = (pairs(settings.chunk, relation) for relation in (jnp.greater_equal, jnp.less))
    earlier = dot(settings, dscores, before, 1, 0)
    return jnp.where(past, earlier + dreads, dwrites).sum(axis=0, keepdims=True) + dkeep


def steps(settings, n):
    """The steps of chunk n in a block."""
    start = n * settings.chunk
    return pl.ds(start if isinstance(n, int) else pl.multiple_of(start, settings.chunk), settings.chunk)


def pairs(size, relation):
    """`relation(i, j)` for all pairs of steps of a chunk."""
    return relation(*(jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1)))


def dot(settings, a, b, a_axis, b_axis):
    """The product over an axis of each, with operands in the type of the settings and float32 sums."""
    return jax.lax.dot_general(
        a.astype(settings.dtype),
        b.astype(settings.dtype),
        (((a_axis,), (b_axis,)), ((), ())),
        precision=jax.lax.Precision.DEFAULT if settings.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def sums(settings, terms, chosen):
    """Sums of float32 terms over what is chosen: one product; for bfloat16 operands, one per part of the split terms."""
    if settings.dtype != jnp.bfloat16:
        return dot(settings, terms, chosen, 1, 0)
    coarse = terms.astype(jnp.bfloat16).astype(jnp.float32)
    return dot(settings, coarse, chosen, 1, 0) + dot(settings, terms - coarse, chosen, 1, 0)
