"""The definition of `long_conv`: one tap of the kernel at a time, in float32 or wider."""

import jax
import jax.numpy as jnp

from layers.kernels.checks import accumulation_dtype
from layers.kernels.isolation import cleaned


def long_conv(x, kernel, skip, input_gate, output_gate, initial_state, circular):
    """y_t = o_t (sum_j k_j u_{t-j} + skip u_t), u = i x; u before the start is the state, zero, or u from its end.

    What is not finite is computed as zero and set afterwards, so that gradients of other outputs do not meet it.
    """
    names = "x", "input_gate", "output_gate", "initial_state"
    given = dict(zip(names, (x, input_gate, output_gate, initial_state), strict=True))
    if not circular:
        finite, _, reached = cleaned({k: v for k, v in given.items() if v is not None}, kernel.shape[1])
        x, input_gate, output_gate, initial_state = (given | finite).values()
    dtype = accumulation_dtype(x, kernel, skip, input_gate, output_gate, initial_state)
    time, taps = x.shape[1], kernel.shape[1]
    u = x.astype(dtype) if input_gate is None else x.astype(dtype) * input_gate.astype(dtype)
    if circular:
        before = jnp.take(u, jnp.arange(-(taps - 1), 0) % time, axis=1)
    elif initial_state is None:
        before = jnp.zeros((u.shape[0], taps - 1, u.shape[2]), dtype)
    else:
        before = initial_state.astype(dtype)
    inputs = jnp.concatenate([before, u], axis=1)

    def add_tap(y, j):
        shifted = jax.lax.dynamic_slice_in_dim(inputs, taps - 1 - j, time, axis=1)
        return y + kernel[None, None, :, j].astype(dtype) * shifted, None

    y, _ = jax.lax.scan(add_tap, jnp.zeros_like(u), jnp.arange(taps))
    if skip is not None:
        y = y + skip[None, None].astype(dtype) * u
    y = y if output_gate is None else output_gate.astype(dtype) * y
    return y if circular else jnp.where(reached, jnp.nan, y)
