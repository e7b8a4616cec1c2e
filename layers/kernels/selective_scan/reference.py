"""The definition of `selective_scan`: one step at a time, in float32 or wider."""

import jax
import jax.numpy as jnp

from layers.kernels.checks import accumulation_dtype
from layers.kernels.segments import Segments
from layers.kernels.shard_map_types import vary_as


def selective_scan(x, dt, a, b, c, skip, gate, dt_bias, dt_softplus, initial_state, segments):
    """h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t^T, with h_{t-1} = 0 where a segment starts and h_t = h_{t-1} on padding."""
    dtype = accumulation_dtype(x, dt, a, b, c, skip, gate, dt_bias, initial_state)
    batch, time, channels = x.shape
    x, dt, a = x.astype(dtype), dt.astype(dtype), a.astype(dtype)
    # Channel i reads group i // (channels of a group).
    b, c = (jnp.repeat(v.astype(dtype), channels // v.shape[2], axis=2) for v in (b, c))
    if dt_bias is not None:
        dt = dt + dt_bias.astype(dtype)[None, None]
    if dt_softplus:
        dt = jax.nn.softplus(dt)
    if segments is None:
        segments = Segments.of(jnp.ones((batch, time), jnp.int32))
    start, padding = segments.starts, ~segments.real
    state = (
        jnp.zeros((batch, channels, a.shape[1]), dtype)
        if initial_state is None
        else initial_state.astype(dtype)
    )

    def step(h, inputs):
        x, dt, b, c, start, padding = inputs
        before = jnp.where(start[:, None, None], 0, h)
        new = jnp.exp(dt[..., None] * a[None]) * before + (dt * x)[..., None] * b
        h = jnp.where(padding[:, None, None], h, new)
        return h, (h * c).sum(-1)

    by_time = tuple(jnp.swapaxes(v, 0, 1) for v in (x, dt, b, c, start, padding))
    final, y = jax.lax.scan(step, vary_as(state, *by_time), by_time)
    y = jnp.swapaxes(y, 0, 1)
    if skip is not None:
        y = y + skip.astype(dtype)[None, None] * x
    if gate is not None:
        y = y * jax.nn.silu(gate.astype(dtype))
    return jnp.where(padding[..., None], 0, y), final
