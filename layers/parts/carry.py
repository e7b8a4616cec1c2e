"""Carrying states from call to call when rows hold several segments.

A mixer's state remembers the id of the last real token of every row, 0 while there was none. The next call continues
that segment if its first real token has the same id, or if it brings no ids; otherwise its state starts from zero.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels.segments import SegmentIds, last_real_id, segment_numbers, segment_positions
from layers.typing import Array, Bool, Int, Num


def refuse_state(mixer: str, state: Any) -> None:
    """Raises ValueError if a non-causal mixer is given a state."""
    if state is not None:
        raise ValueError(
            f"{mixer} is not causal here and has no state; call it with state=None on the whole sequence"
        )


def check_inputs(mixer: str, x: jax.Array, width: int, segment_ids: jax.Array | None) -> None:
    """Raises ValueError or TypeError unless x is (b, t, width) and the ids are integers (b, t)."""
    if x.ndim != 3 or x.shape[-1] != width:
        raise ValueError(f"x of {mixer} has shape {x.shape}; expected (b, t, {width})")
    if segment_ids is not None:
        if segment_ids.shape != x.shape[:2]:
            raise ValueError(f"segment_ids of {mixer} has shape {segment_ids.shape}; expected {x.shape[:2]}")
        if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise TypeError(f"segment_ids of {mixer} has dtype {segment_ids.dtype}; expected an integer type")


def mask_padding(x: Num[Array, "b t *f"], segment_ids: SegmentIds) -> Num[Array, "b t *f"]:
    """Zeroes the features of padding tokens."""
    if segment_ids is None:
        return x
    return jnp.where(jnp.expand_dims(segment_ids != 0, tuple(range(2, x.ndim))), x, 0)


def continues(segment: Int[Array, "b"], segment_ids: SegmentIds) -> Bool[Array, "b"]:
    """Whether the state of each row belongs to the first real token of this call."""
    if segment_ids is None or segment_ids.shape[1] == 0:
        return jnp.ones(segment.shape, bool)
    index = jnp.argmax(segment_ids != 0, axis=1)
    first = jnp.take_along_axis(segment_ids, index[:, None], axis=1)[:, 0]
    return (segment == 0) | (first == 0) | (first == segment)


def next_segment(segment: Int[Array, "b"], segment_ids: SegmentIds, time: int) -> Int[Array, "b"]:
    """The id to remember after a call of `time` tokens. Without ids, rows that had none yet count as segment 1."""
    if time == 0:
        return segment
    if segment_ids is None:
        return jnp.where(segment == 0, 1, segment)
    return last_real_id(segment_ids, segment)[:, -1].astype(segment.dtype)


def enter(state: Num[Array, "b *s"], keep: Bool[Array, "b"]) -> Num[Array, "b *s"]:
    """The carried state where it is kept, zero elsewhere."""
    return jnp.where(jnp.expand_dims(keep, tuple(range(1, state.ndim))), state, 0)


class Place(NamedTuple):
    """Where the rows of a batch stand.

    Attributes:
      segment: id of the last real token of each row, 0 before there is one.
      number: segments begun in each row.
      position: real tokens of the current segment so far.
    """

    segment: Int[Array, "b"]
    number: Int[Array, "b"]
    position: Int[Array, "b"]


def start(batch_size: int) -> Place:
    """The place before the first token."""
    zero = jnp.zeros(batch_size, jnp.int32)
    return Place(zero, zero, zero)


def walk(
    place: Place, segment_ids: SegmentIds, shape: tuple[int, int]
) -> tuple[Int[Array, "b t"], Int[Array, "b t"], Place]:
    """Number of the segment, counted over all calls, and position in it of every new token; and the new place.

    Padding has number 0.
    """
    ids = jnp.ones(shape, jnp.int32) if segment_ids is None else segment_ids
    going_on = continues(place.segment, segment_ids) & (place.number > 0)
    here = segment_numbers(ids)
    numbers = jnp.where(here == 0, 0, here + (place.number - going_on)[:, None])
    first = going_on[:, None] & (here == 1)
    positions = segment_positions(ids) + jnp.where(first, place.position[:, None], 0)
    last = jnp.where(here != 0, jnp.arange(shape[1])[None], -1).max(1, initial=-1)

    def at_last(values, before):
        if shape[1] == 0:
            return before
        picked = jnp.take_along_axis(values, jnp.maximum(last, 0)[:, None], axis=1)[:, 0]
        return jnp.where(last >= 0, picked, before)

    return (
        numbers,
        positions,
        Place(
            next_segment(place.segment, segment_ids, shape[1]),
            at_last(numbers, place.number),
            at_last(positions + 1, place.position),
        ),
    )
