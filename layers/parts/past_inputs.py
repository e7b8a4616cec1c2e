"""Past inputs that causal filters carry from call to call, where no recurrence of fixed size gives their kernels.

A filter of l taps needs the last l - 1 inputs of the current segment. A state may hold fewer, to save memory; outputs
that need more are NaN. A mixer that carries past inputs sets `keeps_segments = True`.
"""

import jax.numpy as jnp

from layers.parts.segmented_convolution import convolve, last_inputs
from layers.segments import SegmentIds, Visit, keep_where
from layers.typing import Array, Bool, Float


def no_inputs(
    batch_size: int, *, filters: int, taps: int, width: int, max_length: int | None
) -> Float[Array, "b f s d"]:
    """Returns the initial state: as many zeros as `taps`, or segments of `max_length` tokens, need."""
    size = taps if max_length is None else max(1, min(taps, max_length))
    return jnp.zeros((batch_size, filters, size - 1, width), jnp.float32)


def enter_call(
    past: Float[Array, "b f s d"], taps: int, visit: Visit
) -> tuple[Float[Array, "b f s d"], Bool[Array, "b t"]]:
    """Returns the past inputs that the first segment of a call continues.

    Returns:
      past: zeros in rows that begin another segment.
      lost: tokens for which a filter of `taps` taps needs inputs that are not held.
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
    """Returns the causal convolution of x after the past inputs, and the inputs to keep."""
    y = convolve(x, kernel[:, : past.shape[1] + 1], past=past, segment_ids=segment_ids)
    return y, last_inputs(past, x, segment_ids)
