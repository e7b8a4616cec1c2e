"""The definition of `linear_recurrence`: one step at a time, in float32 or wider."""

import jax
import jax.numpy as jnp

from layers.kernels.checks import accumulation_dtype
from layers.kernels.segments import Segments
from layers.kernels.shard_map_types import vary_as


def linear_recurrence(a, x, initial_state, segments, reverse):
    """h_t = a_t h_{t-1} + x_t, with h_{t-1} = 0 where a segment starts and h_t = h_{t-1} on padding.

    What is not finite is computed as zero and remembered per channel: gradients then stay in their segment too.
    """
    dtype = accumulation_dtype(a, x, initial_state)
    a = jnp.broadcast_to(a, x.shape).astype(dtype)
    ids = jnp.ones(x.shape[:2], jnp.int32) if segments is None else segments.ids
    if reverse:
        a, x, ids = a[:, ::-1], x[:, ::-1], ids[:, ::-1]
    start, padding = Segments.of(ids).starts, ids == 0
    state = (
        jnp.zeros((x.shape[0], x.shape[2]), dtype) if initial_state is None else initial_state.astype(dtype)
    )

    x = x.astype(dtype)
    fit = jnp.isfinite(a) & jnp.isfinite(x)
    kept = fit & ~padding[..., None]
    a, x = jnp.where(kept, a, 0), jnp.where(kept, x, 0)

    def step(carry, inputs):
        (h, spoiled), (a, x, fit, start, padding) = carry, inputs
        start, padding = start[:, None], padding[:, None]
        new = a * jnp.where(start, 0, h) + x
        h = jnp.where(padding, h, new)
        spoiled = jnp.where(padding, spoiled, (spoiled & ~start) | ~fit)
        return (h, spoiled), jnp.where(spoiled, jnp.nan, h)

    by_time = tuple(jnp.swapaxes(v, 0, 1) for v in (a, x, fit, start, padding))
    fit = jnp.isfinite(state)
    start = vary_as(jnp.where(fit, state, 0), *by_time), vary_as(~fit, *by_time)
    (final, spoiled), h = jax.lax.scan(step, start, by_time)
    h = jnp.swapaxes(h, 0, 1)
    return (h[:, ::-1] if reverse else h), jnp.where(spoiled, jnp.nan, final)
