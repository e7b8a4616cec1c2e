"""The definition of `linear_recurrence`: one step at a time, in float32 or wider."""

import jax
import jax.numpy as jnp

from layers.kernels.checks import accumulation_dtype
from layers.kernels.segments import Segments


def linear_recurrence(a, x, initial_state, segments, reverse):
    """h_t = a_t h_{t-1} + x_t, with a_t = 0 where a segment starts and h_t = h_{t-1} on padding."""
    dtype = accumulation_dtype(a, x, initial_state)
    a = jnp.broadcast_to(a, x.shape).astype(dtype)
    ids = jnp.ones(x.shape[:2], jnp.int32) if segments is None else segments.ids
    if reverse:
        a, x, ids = a[:, ::-1], x[:, ::-1], ids[:, ::-1]
    start, padding = Segments.of(ids).starts, ids == 0
    state = (
        jnp.zeros((x.shape[0], x.shape[2]), dtype) if initial_state is None else initial_state.astype(dtype)
    )

    def step(h, inputs):
        a, x, start, padding = inputs
        new = jnp.where(start[:, None], 0, a) * h + x
        h = jnp.where(padding[:, None], h, new)
        return h, h

    by_time = tuple(jnp.swapaxes(v, 0, 1) for v in (a, x.astype(dtype), start, padding))
    final, h = jax.lax.scan(step, state, by_time)
    h = jnp.swapaxes(h, 0, 1)
    return (h[:, ::-1] if reverse else h), final
