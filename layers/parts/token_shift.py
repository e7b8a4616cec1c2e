"""The token shift of RWKV: the predecessor of each token in its segment."""

import jax.numpy as jnp

from layers.kernels.short_conv import short_conv
from layers.segments import SegmentIds
from layers.typing import Array, Float


def token_shift(
    x: Float[Array, "b t d"],
    last: Float[Array, "b 1 d"] | None = None,
    *,
    segment_ids: SegmentIds = None,
) -> tuple[Float[Array, "b t d"], Float[Array, "b 1 d"]]:
    """Returns x_{t-1} for each t, zero at the start of a segment, and the last input for the next call.

    Args:
      x: input.
      last: the token before the first real one, zero if that begins a segment.
      segment_ids: see `layers.kernels.segments`; padding is skipped, and its output is zero.
    """
    taps = jnp.stack([jnp.ones(x.shape[-1], x.dtype), jnp.zeros(x.shape[-1], x.dtype)])
    return short_conv(x, taps, initial_state=last, segment_ids=segment_ids)
