"""The short convolution inside mixers: a depthwise causal filter with its own parameters and carried inputs."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from layers.kernels.short_conv import WIDTHS, short_conv
from layers.parameters import NO_DECAY, Initializer, parameter, uniform_fan_in
from layers.segments import SegmentIds
from layers.typing import Array, Float


class ShortConvolution(nnx.Module):
    """y_t = activation(bias + sum_j weight_j x_{t-(w-1)+j}), per channel; see `short_conv`.

    Part of a mixer rather than a mixer: its state holds the last w - 1 inputs, and the mixer that owns it carries them.
    Weights (w, d) start uniform in +-1/sqrt(w), as in Mamba's code, unless `init` draws them.

    Args:
      axis: logical axis of the channels.
    """

    def __init__(
        self,
        width: int,
        taps: int = 4,
        *,
        bias: bool = False,
        activation: str | None = "silu",
        init: Initializer | None = None,
        axis: str | None = "inner",
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if taps not in WIDTHS:
            raise ValueError(f"taps={taps}; expected {WIDTHS[0]} to {WIDTHS[-1]}")
        self.activation, self.dtype = activation, dtype
        zeros = nnx.initializers.zeros_init()
        self.weight = parameter(rngs, init or uniform_fan_in(), (taps, width), axes=(None, axis))
        self.bias = parameter(rngs, zeros, (width,), axes=(axis,), **NO_DECAY) if bias else None

    def init_state(self, batch_size: int) -> Float[Array, "b memory d"]:
        """Returns the zero state."""
        taps, width = self.weight.shape
        return jnp.zeros((batch_size, taps - 1, width), jnp.float32)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: Float[Array, "b memory d"] | None = None,
        *,
        segment_ids: SegmentIds = None,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b memory d"]]:
        """Returns the filtered input and the last inputs; a state that is passed must belong to the first segment."""
        return short_conv(
            x.astype(self.dtype),
            self.weight[...],
            None if self.bias is None else self.bias[...],
            activation=self.activation,
            initial_state=state,
            segment_ids=segment_ids,
        )
