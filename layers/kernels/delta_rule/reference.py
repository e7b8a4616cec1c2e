"""The definitions of `delta_rule` and `dplr_delta_rule`: one step at a time, in float32 or wider."""

import functools

import jax
import jax.numpy as jnp

from layers.kernels.checks import accumulation_dtype
from layers.kernels.segments import Segments

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def delta_rule(q, k, v, beta, log_decay, scale, normalize_qk, initial_state, segments):
    """S' = Diag(alpha_t) S_{t-1}, S_t = S' + beta_t k_t (v_t - S'^T k_t)^T, o_t = scale S_t^T q_t."""
    dtype = accumulation_dtype(q, k, v, beta, log_decay, initial_state)
    q, k, v, beta = (x.astype(dtype) for x in (q, k, v, beta))
    if normalize_qk:
        q, k = (x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6) for x in (q, k))
    q, k = (jnp.repeat(x, v.shape[2] // x.shape[2], axis=2) for x in (q, k))

    def update(state, k, v, beta, alpha):
        state = alpha * state
        error = v - _einsum("bhkv,bhk->bhv", state, k)
        return state + beta[..., None, None] * k[..., :, None] * error[..., None, :]

    inputs = k, v, beta, _decay(log_decay, v, dtype)
    return _run(update, inputs, scale * q, _state(initial_state, k, v), segments)


def dplr_delta_rule(q, k, v, a, b, log_decay, scale, initial_state, segments):
    """S_t = Diag(w_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T, o_t = scale S_t^T q_t."""
    dtype = accumulation_dtype(q, k, v, a, b, log_decay, initial_state)
    q, k, v, a, b = (x.astype(dtype) for x in (q, k, v, a, b))

    def update(state, k, v, a, b, w):
        read = _einsum("bhkv,bhk->bhv", state, a)
        return w * state + b[..., :, None] * read[..., None, :] + k[..., :, None] * v[..., None, :]

    inputs = k, v, a, b, _decay(log_decay, v, dtype)
    return _run(update, inputs, scale * q, _state(initial_state, k, v), segments)


def _decay(log_decay, v, dtype):
    """exp(log_decay) as (b, t, h, k or 1, 1), to multiply states with."""
    if log_decay is None:
        return jnp.ones((*v.shape[:3], 1, 1), dtype)
    decay = jnp.exp(log_decay.astype(dtype))
    return decay[..., None, None] if decay.ndim == 3 else decay[..., None]


def _state(initial_state, k, v):
    shape = (*v.shape[:1], *v.shape[2:3], k.shape[-1], v.shape[-1])
    return jnp.zeros(shape, v.dtype) if initial_state is None else initial_state.astype(v.dtype)


def _run(update, inputs, q, state, segments):
    """Every output and the last state; a segment starts from zero, padding keeps the state and has zero outputs."""
    if segments is None:
        segments = Segments.of(jnp.ones(q.shape[:2], jnp.int32))
    start, padding = segments.starts, ~segments.real

    def step(state, inputs):
        inputs, q, start, padding = inputs
        start, padding = start[:, None, None, None], padding[:, None, None, None]
        state = jnp.where(padding, state, update(jnp.where(start, 0, state), *inputs))
        return state, jnp.where(padding[..., 0], 0, _einsum("bhkv,bhk->bhv", state, q))

    by_time = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (inputs, q, start, padding))
    final, o = jax.lax.scan(step, state, by_time)
    return jnp.swapaxes(o, 0, 1), final
