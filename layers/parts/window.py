"""A weighted sum over the last few tokens of a segment, with weights that may change from token to token."""

import jax
import jax.numpy as jnp

from layers.parts.carry import mask_padding
from layers.parts.segmented_convolution import move, pack
from layers.segments import SegmentIds
from layers.typing import Array, Float


def window_sum(
    x: Float[Array, "b t d"],
    weights: Float[Array, "#b #t h w"],
    past: Float[Array, "b s d"],
    *,
    segment_ids: SegmentIds = None,
) -> Float[Array, "b t d"]:
    """y_t = sum_{j<w} weights_{t,h,j} x_{t-(w-1)+j} for the d / h neighbouring channels of every head h, in float32.

    Args:
      x: input.
      weights: oldest tap first, the last one for the token itself; the same for all tokens where t is 1.
      past: the w - 1 inputs before the first real token, zeros where its segment had not begun.
      segment_ids: tokens of other segments count as zeros; the output on padding is zero.
    """
    taps, channels = weights.shape[-1], x.shape[2] // weights.shape[2]
    numbers = jnp.ones(x.shape[:2], jnp.int32)
    if segment_ids is not None:
        order, place, numbers = pack(segment_ids)
        x = move(x, order)
        weights = weights if weights.shape[1] == 1 else move(weights, order)
    inputs = jnp.concatenate([past, x.astype(past.dtype)], axis=1)
    owners = jnp.pad(numbers, ((0, 0), (taps - 1, 0)), constant_values=1)

    def add(y, tap):
        value, owner = (jax.lax.dynamic_slice_in_dim(v, tap, x.shape[1], axis=1) for v in (inputs, owners))
        weight = jnp.repeat(
            jax.lax.dynamic_index_in_dim(weights, tap, axis=3, keepdims=False), channels, axis=2
        )
        return y + jnp.where((owner == numbers)[..., None], weight * value, 0), None

    y, _ = jax.lax.scan(add, jnp.zeros(x.shape, past.dtype), jnp.arange(taps))
    return y if segment_ids is None else mask_padding(move(y, place), segment_ids)
