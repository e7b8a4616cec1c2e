"""The definition of `gated_linear_attention`: one step at a time, in float32 or wider."""

import jax
import jax.numpy as jnp

from layers.kernels.checks import accumulation_dtype
from layers.kernels.segments import Segments
from layers.kernels.shard_map_types import vary_as


def gated_linear_attention(q, k, v, log_decay, bonus, scale, normalize, initial_state, segments, smallest):
    """S_t = Diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T, read after the step, or before it if there is a bonus."""
    dtype = accumulation_dtype(q, k, v, log_decay, bonus, initial_state)
    batch, time = q.shape[:2]
    heads = max(x.shape[2] for x in (q, k, v))
    if log_decay is None:
        log_decay = jnp.zeros((1, 1, heads, 1), dtype)
    elif log_decay.ndim == 1:
        log_decay = log_decay[None, None, :, None]
    elif log_decay.ndim == 3:
        log_decay = log_decay[..., None]
    heads = max(heads, log_decay.shape[2], 0 if bonus is None else bonus.shape[0])
    q, k, v = (jnp.repeat(x, heads // x.shape[2], axis=2).astype(dtype) for x in (q, k, v))
    if normalize:
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    log_decay = jnp.broadcast_to(log_decay, (batch, time, heads, log_decay.shape[-1])).astype(dtype)
    if segments is None:
        segments = Segments.of(jnp.ones((batch, time), jnp.int32))
    state = jnp.zeros((batch, heads, k.shape[-1], v.shape[-1]), dtype)
    if initial_state is not None:
        state = initial_state.astype(dtype)

    def step(state, inputs):
        q, k, v, log_decay, start, padding = inputs
        start, padding = start[:, None, None, None], padding[:, None, None, None]
        before = jnp.where(start, 0, state)
        write = k[..., :, None] * v[..., None, :]
        after = jnp.exp(log_decay)[..., None] * before + write
        read = after if bonus is None else before + bonus.astype(dtype)[None, :, :, None] * write
        o = jnp.einsum("bhk,bhkv->bhv", q, read, precision=jax.lax.Precision.HIGHEST)
        return jnp.where(padding, state, after), jnp.where(padding[..., 0], 0, o)

    inputs = (q, k, v, log_decay, segments.starts, ~segments.real)
    final, o = jax.lax.scan(step, vary_as(state, *inputs), tuple(jnp.swapaxes(x, 0, 1) for x in inputs))
    o = jnp.swapaxes(o, 0, 1)
    if normalize:
        denominator = o[..., -1:]
        small = jnp.abs(denominator) < smallest
        o = o[..., :-1] / jnp.where(small, jnp.where(denominator < 0, -smallest, smallest), denominator)
        return o, final
    return scale * o, final
