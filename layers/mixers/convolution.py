"""The short convolution inside mixers: a depthwise causal filter with its own parameters and carried inputs."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.kernels.short_conv import short_conv
from layers.parameters import NO_DECAY, parameter
from layers.typing import Array, Float, Int


class ShortConvolution(nnx.Module):
    """y_t = activation(bias + sum_j weight_j x_{t-(w-1)+j}), for every channel by itself; see `short_conv`.

    Part of a mixer rather than a mixer: its state holds the last w - 1 inputs, and the mixer that owns it remembers
    which segment they belong to (`layers.mixers.carry`). Weights start uniform in +-1/sqrt(w), as in Mamba's code.
    """

    def __init__(
        self,
        width: int,
        taps: int = 4,
        *,
        bias: bool = False,
        activation: str | None = "silu",
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.activation, self.dtype = activation, dtype
        bound = 1 / math.sqrt(taps)
        self.weight = parameter(
            rngs,
            lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound),
            (taps, width),
        )
        self.bias = parameter(rngs, nnx.initializers.zeros_init(), (width,), **NO_DECAY) if bias else None

    def init_state(self, batch_size: int) -> Float[Array, "b w-1 d"]:
        """No inputs yet."""
        taps, width = self.weight.shape
        return jnp.zeros((batch_size, taps - 1, width), jnp.float32)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: Float[Array, "b w-1 d"] | None = None,
        *,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b w-1 d"]]:
        """The filtered input, and the last inputs; a state given here must already be that of the first segment."""
        return short_conv(
            x.astype(self.dtype),
            self.weight[...],
            None if self.bias is None else self.bias[...],
            activation=self.activation,
            initial_state=state,
            segment_ids=segment_ids,
        )
