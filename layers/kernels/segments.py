"""Segments: several sequences packed into one row, and padding.

`segment_ids` is an integer array (b, t). 0 is padding: such a token changes no state and is seen by no other. The
other tokens of a row form segments, maximal runs of equal ids with the padding left out; tokens of different segments
do not see each other. An initial state belongs to the segment of the first real token of the row.
"""

import jax
import jax.numpy as jnp


def last_real_id(segment_ids: jax.Array, before: jax.Array | None = None) -> jax.Array:
    """The id of the last real token up to and including each position, (b, t); `before` (b), or 0, until there is one."""
    time = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    index = jax.lax.cummax(jnp.where(segment_ids != 0, time[None], -1), axis=1)
    ids = jnp.take_along_axis(segment_ids, jnp.maximum(index, 0), axis=1)
    first = jnp.zeros(segment_ids.shape[:1], segment_ids.dtype) if before is None else before
    return jnp.where(index >= 0, ids, first[:, None])


def segment_starts(segment_ids: jax.Array) -> jax.Array:
    """True (b, t) at the first token of every segment but the row's first: where a state must be forgotten."""
    before = jnp.pad(last_real_id(segment_ids), ((0, 0), (1, 0)))[:, :-1]
    return (segment_ids != 0) & (before != 0) & (segment_ids != before)


def segment_numbers(segment_ids: jax.Array) -> jax.Array:
    """Numbers the segments of a row 1, 2, ... and padding 0, so that two tokens share a segment iff numbers agree."""
    number = 1 + jnp.cumsum(segment_starts(segment_ids), axis=1, dtype=jnp.int32)
    return jnp.where(segment_ids != 0, number, 0)
