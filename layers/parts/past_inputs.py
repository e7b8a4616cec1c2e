"""The inputs that causal filters carry from call to call, when no recurrence of fixed size gives their kernels.

A filter of l taps needs the last l - 1 inputs of the current segment. A state may hold fewer, to save memory; outputs
that need more are then NaN. A mixer that carries past inputs sets `keeps_segments = True`.
"""

import jax.numpy as jnp

from layers.parts.segmented_convolution import convolve, last_inputs
from layers.segments import SegmentIds, Visit, keep_where
from layers.typing import Array, Bool, Float


def no_inputs(
    batch_size: int, *, filters: int, taps: int, width: int, max_length: int | None
) -> Float[Array, "b f s d"]:
    """What filters carry before the first token: zeros, as many as `taps` or segments of `max_length` tokens need."""
    size = taps if max_length is None else max(1, min(taps, max_length))
    return jnp.zeros((batch_size, filters, size - 1, width), jnp.float32)


def enter_call(
    past: Float[Array, "b f s d"], taps: int, visit: Visit
) -> tuple[Float[Array, "b f s d"], Bool[Array, "b t"]]:
    """The past inputs that the first segment of a call continues.

    Returns:
      past: zeros in rows that begin another segment.
      lost: tokens of which a filter of `taps` taps would see inputs that are not held.
    """
    size = past.shape[2]
    lost = (visit.numbers != 0) & (visit.positions > size) & (size + 1 < taps)
    return keep_where(visit.continues, past, jnp.zeros_like(past)), lost


def filter_next(
    x: Float[Array, "b t d"],
    kernel: Float[Array, "d l"],
    past: Float[Array, "b s d"],
    segment_ids: SegmentIds,
) -> tuple[Float[Array, "b t d"], Float[Array, "b s d"]]:
    """The causal convolution of x as it follows the past inputs, and the inputs to keep."""
    y = convolve(x, kernel[:, : past.shape[1] + 1], past=past, segment_ids=segment_ids)
    return y, last_inputs(past, x, segment_ids)
