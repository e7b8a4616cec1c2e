"""The inputs that causal filters carry from call to call, when no recurrence of fixed size gives their kernels.

A filter of l taps needs the last l - 1 inputs of the current segment. A state may be made for fewer, to save memory;
then outputs that would need more are NaN.
"""

from typing import NamedTuple

import jax.numpy as jnp

from layers.kernels.segments import SegmentIds
from layers.parts.carry import Place, continues, enter, start, walk
from layers.parts.segmented_convolution import convolve, remember
from layers.typing import Array, Bool, Float


class PastInputs(NamedTuple):
    """What filters carry.

    Attributes:
      inputs: the last s inputs of every filter f, the latest last.
      place: where the rows stand.
    """

    inputs: Float[Array, "b f s d"]
    place: Place


def no_inputs(batch_size: int, *, filters: int, taps: int, width: int, max_length: int | None) -> PastInputs:
    """The state before the first token, for segments of up to `max_length` tokens if that is less than `taps`."""
    size = taps if max_length is None else max(1, min(taps, max_length))
    return PastInputs(jnp.zeros((batch_size, filters, size - 1, width), jnp.float32), start(batch_size))


def resume(
    past: PastInputs, taps: int, segment_ids: SegmentIds, shape: tuple[int, int]
) -> tuple[PastInputs, Bool[Array, "b t"]]:
    """The inputs that the first segment of this call continues, beside the place after the call.

    Returns:
      past: inputs as the new tokens find them, and where the rows stand after them.
      lost: tokens of which a filter of `taps` taps would see inputs that are no longer held.
    """
    size = past.inputs.shape[2]
    inputs = enter(past.inputs, continues(past.place.segment, segment_ids))
    numbers, positions, place = walk(past.place, segment_ids, shape)
    return PastInputs(inputs, place), (numbers != 0) & (positions > size) & (size + 1 < taps)


def filter_next(
    x: Float[Array, "b t d"],
    kernel: Float[Array, "d l"],
    past: Float[Array, "b s d"],
    segment_ids: SegmentIds,
) -> tuple[Float[Array, "b t d"], Float[Array, "b s d"]]:
    """The causal convolution of x as it follows the past inputs, and the inputs to keep."""
    y = convolve(x, kernel[:, : past.shape[1] + 1], past=past, segment_ids=segment_ids)
    return y, remember(past, x, segment_ids)
