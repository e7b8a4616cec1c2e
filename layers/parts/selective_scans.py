"""Selective scans with parameters of their own on several sequences of the same channels, as in VMamba."""

import jax.numpy as jnp
from flax import nnx

from layers.kernels.selective_scan import selective_scan
from layers.options import ActivationDtype
from layers.parameters import NO_DECAY, declared, parameter
from layers.parts.step_size import step_size_bias
from layers.segments import SegmentIds
from layers.typing import Array, Float


class SelectiveScans(nnx.Module):
    """The selective state spaces of Mamba for k sequences, one set of parameters each.

        [r, B_t, C_t] = W_x u_t,   dt_t = softplus(W_dt r + b_dt)
        h_t = exp(dt_t A) h_{t-1} + (dt_t u_t) B_t^T,   y_t = h_t C_t + D u_t

    Args:
      count: k.
      channels: e, channels of each sequence.
      state_size: n, states of each channel.
      rank: rank of the map to step sizes.
      steps: lower and upper end and floor of the initial step sizes, which are log-uniform.
      dtype: type of the activations.
    """

    def __init__(
        self,
        count: int,
        channels: int,
        state_size: int,
        rank: int,
        *,
        steps: tuple[float, float, float],
        dtype: ActivationDtype,
        rngs: nnx.Rngs,
    ):
        self.sizes, self.dtype = (rank, state_size), dtype
        fan_in = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=0)
        shape = (count, channels, rank + 2 * state_size)
        self.selection = parameter(rngs, fan_in, shape, axes=(None, "inner", None))
        self.dt = parameter(rngs, fan_in, (count, rank, channels), axes=(None, None, "inner"))
        own = {"axes": (None, "inner"), **NO_DECAY}
        self.dt_bias = parameter(rngs, step_size_bias(*steps), (count, channels), **own)
        rates = jnp.log(jnp.arange(1.0, state_size + 1, dtype=jnp.float32))
        rates = jnp.broadcast_to(rates, (count, channels, state_size))
        self.log_a = declared(rates, axes=(None, "inner", "state"), **NO_DECAY)
        self.d = parameter(rngs, nnx.initializers.ones_init(), (count, channels), **own)

    def __call__(self, u: Float[Array, "b t k e"], segment_ids: SegmentIds = None) -> Float[Array, "b t k e"]:
        """Returns the outputs of the k sequences u, whose tokens belong to the same segments."""
        (b, t, count, channels), (rank, size) = u.shape, self.sizes
        selected = jnp.einsum("btke,ker->btkr", u, self.selection[...].astype(u.dtype))
        r, inputs, outputs = jnp.split(selected, [rank, rank + size], axis=3)
        dt = jnp.einsum("btkr,kre->btke", r, self.dt[...].astype(u.dtype))
        y, _ = selective_scan(
            u.reshape(b, t, count * channels),
            dt.reshape(b, t, count * channels),
            -jnp.exp(self.log_a[...]).reshape(count * channels, size),
            inputs,
            outputs,
            skip=self.d[...].reshape(-1),
            dt_bias=self.dt_bias[...].reshape(-1),
            dt_softplus=True,
            segment_ids=segment_ids,
        )
        return y.reshape(u.shape)
