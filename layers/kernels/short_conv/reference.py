"""The definition of `short_conv`: one step at a time, in float32 or wider."""

import jax
import jax.numpy as jnp

from layers.kernels.checks import accumulation_dtype
from layers.kernels.segments import Segments


def short_conv(x, weight, bias, activation, initial_state, segments):
    """y_t = activation(bias + sum_j weight_j window_j), where the window ends with x_t and is reset at segment starts.

    What is not finite is computed as zero and remembered: gradients then stay in their segment too.
    """
    dtype = accumulation_dtype(x, weight, bias, initial_state)
    (batch, time, channels), width = x.shape, weight.shape[0]
    weight = weight.astype(dtype)
    if segments is None:
        segments = Segments.of(jnp.ones((batch, time), jnp.int32))
    state = (
        jnp.zeros((batch, width - 1, channels), dtype)
        if initial_state is None
        else initial_state.astype(dtype)
    )

    x, padding = x.astype(dtype), ~segments.real
    fit = jnp.isfinite(x)
    x = jnp.where(fit & ~padding[..., None], x, 0)

    def step(carry, inputs):
        (state, spoiled), (x, fit, start, padding) = carry, inputs
        start = start[:, None, None]
        window = jnp.concatenate([jnp.where(start, 0, state), x[:, None]], axis=1)
        marks = jnp.concatenate([spoiled & ~start, ~fit[:, None]], axis=1)
        y = (weight[None] * window).sum(1)
        if bias is not None:
            y = y + bias.astype(dtype)[None]
        if activation == "silu":
            y = jax.nn.silu(y)
        y = jnp.where(padding[:, None], 0, jnp.where(marks.any(1), jnp.nan, y))
        old, new = (state, spoiled), (window[:, 1:], marks[:, 1:])
        return jax.tree.map(lambda o, n: jnp.where(padding[:, None, None], o, n), old, new), y

    by_time = tuple(jnp.swapaxes(v, 0, 1) for v in (x, fit, segments.starts, padding))
    fit = jnp.isfinite(state)
    (final, spoiled), y = jax.lax.scan(step, (jnp.where(fit, state, 0), ~fit), by_time)
    return jnp.swapaxes(y, 0, 1), jnp.where(spoiled, jnp.nan, final)
