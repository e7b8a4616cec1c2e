"""The definition of `short_conv`: one step at a time, in float32 or wider."""

import jax
import jax.numpy as jnp

from layers.kernels.checks import accumulation_dtype
from layers.kernels.segments import Segments


def short_conv(x, weight, bias, activation, initial_state, segments):
    """y_t = activation(bias + sum_j weight_j window_j), where the window ends with x_t and is reset at segment starts."""
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

    def step(state, inputs):
        x, start, padding = inputs
        window = jnp.concatenate([jnp.where(start[:, None, None], 0, state), x[:, None]], axis=1)
        y = (weight[None] * window).sum(1)
        if bias is not None:
            y = y + bias.astype(dtype)[None]
        if activation == "silu":
            y = jax.nn.silu(y)
        y = jnp.where(padding[:, None], 0, y)
        return jnp.where(padding[:, None, None], state, window[:, 1:]), y

    by_time = (x.astype(dtype), segments.starts, ~segments.real)
    final, y = jax.lax.scan(step, state, tuple(jnp.swapaxes(v, 0, 1) for v in by_time))
    return jnp.swapaxes(y, 0, 1), final
