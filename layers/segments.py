"""Segments across calls: where the rows of a batch stand between one call and the next.

A mixer's state holds the id of the last real token of every row, 0 before there is one. The next call continues that
segment if its first real token has the same id, or if it has no ids; otherwise its state is reset.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels.segments import SegmentIds, Segments, last_real_id, select_real
from layers.typing import Array, Bool, Int, Num

__all__ = [
    "Place",
    "SegmentIds",
    "Segments",
    "Visit",
    "initial_place",
    "keep_where",
    "select_masked",
    "select_real",
    "visit",
]


class Place(NamedTuple):
    """Where the rows of a batch stand.

    Attributes:
      segment: id of the last real token of each row, 0 before there is one.
      number: number of segments that have begun in each row.
      position: number of real tokens of the current segment so far.
    """

    segment: Int[Array, "b"]
    number: Int[Array, "b"]
    position: Int[Array, "b"]


class Visit(NamedTuple):
    """How the tokens of one call continue what came before.

    Attributes:
      continues: whether what the row carries belongs to the segment of its first real token.
      numbers: the segment of every token, counted over all calls from 1; 0 is padding.
      positions: the position of every token in its segment, counted over all calls.
      place: where the rows stand after the call.
    """

    continues: Bool[Array, "b"]
    numbers: Int[Array, "b t"]
    positions: Int[Array, "b t"]
    place: Place


def initial_place(batch_size: int) -> Place:
    """Returns the place before the first token."""
    zero = jnp.zeros(batch_size, jnp.int32)
    return Place(zero, zero, zero)


def select_masked(x: Num[Array, "*b d"], mask: Bool[Array, "*b"] | None) -> Num[Array, "*b d"]:
    """Returns x at the tokens of the mask and zero elsewhere, whatever stands there; x itself without a mask."""
    return x if mask is None else jnp.where(mask[..., None], x, 0)


def keep_where(keep: Bool[Array, "b"], state: Any, otherwise: Any) -> Any:
    """Returns a pytree with the rows of `state` where `keep` is True, and those of `otherwise` elsewhere."""

    def select(kept, other):
        return jnp.where(jnp.expand_dims(keep, tuple(range(1, kept.ndim))), kept, other)

    return jax.tree.map(select, state, otherwise)


def visit(place: Place, segment_ids: SegmentIds, time: int) -> Visit:
    """Returns how `time` tokens continue rows that stand at `place`."""
    rows = place.segment.shape[0]
    begun = place.number > 0
    if time == 0:
        empty = jnp.zeros((rows, 0), jnp.int32)
        return Visit(jnp.ones(rows, bool), empty, empty, place)
    if segment_ids is None:
        number = jnp.where(begun, place.number, 1)
        positions = place.position[:, None] + jnp.arange(time, dtype=jnp.int32)[None]
        after = Place(jnp.where(begun, place.segment, 1), number, place.position + time)
        return Visit(
            jnp.ones(rows, bool), jnp.broadcast_to(number[:, None], positions.shape), positions, after
        )
    segments = Segments.of(segment_ids)
    ids, here = segments.ids, segments.numbers
    first = jnp.take_along_axis(ids, jnp.argmax(ids != 0, axis=1)[:, None], axis=1)[:, 0]
    continues = ~begun | (first == 0) | (first == place.segment)
    same = begun & continues
    numbers = jnp.where(here == 0, 0, here + (place.number - same.astype(jnp.int32))[:, None])
    positions = segments.positions + jnp.where(same[:, None] & (here == 1), place.position[:, None], 0)
    last = jnp.where(here != 0, jnp.arange(time, dtype=jnp.int32)[None], -1).max(1)

    def at_last(values, before):
        picked = jnp.take_along_axis(values, jnp.maximum(last, 0)[:, None], axis=1)[:, 0]
        return jnp.where(last >= 0, picked, before)

    after = Place(
        last_real_id(ids, place.segment.astype(ids.dtype))[:, -1].astype(jnp.int32),
        at_last(numbers, place.number),
        at_last(positions + 1, place.position),
    )
    return Visit(continues, numbers, positions, after)
