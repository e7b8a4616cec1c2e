"""The log-decays of the gated delta rules: Mamba's softplus of the input times a learned rate, and one that is bounded."""

import jax
import jax.numpy as jnp
from flax import nnx

from layers.parameters import NO_DECAY, log_of_uniform, parameter
from layers.parts.step_size import step_size_bias
from layers.typing import Array, Float


class SoftplusDecay(nnx.Module):
    """log alpha = -exp(log_rate) softplus(f + bias), at most 0, from an input f; float32.

    There is one rate per head, which starts uniform in `rates`. softplus(bias) starts log-uniform in [0.001, 0.1]; there
    is one bias per head, or one per channel of each head.
    """

    def __init__(
        self, heads: int, channels: int | None = None, *, rates: tuple[float, float], rngs: nnx.Rngs
    ):
        shape = (heads,) if channels is None else (heads, channels)
        axes = ("heads", None)[: len(shape)]
        self.log_rate = parameter(rngs, log_of_uniform(*rates), (heads,), axes=("heads",), **NO_DECAY)
        self.bias = parameter(rngs, step_size_bias(0.001, 0.1, 1e-4), shape, axes=axes, **NO_DECAY)

    def __call__(self, f: Float[Array, "b t h *k"]) -> Float[Array, "b t h *k"]:
        """Returns the log-decay per head, or per channel."""
        rate = jnp.exp(self.log_rate[...]).reshape((1, 1, -1) + (1,) * (f.ndim - 3))
        return -rate * jax.nn.softplus(f.astype(jnp.float32) + self.bias[...][None, None])


class BoundedDecay(nnx.Module):
    """log alpha = lowest sigmoid(exp(log_rate) (f + bias)), between lowest < 0 and 0, from an input f; float32.

    There is one rate per head, which starts at 1, and one bias per channel of each head, as that of `SoftplusDecay`. No step
    forgets more than exp(lowest), which kernels need to work on long chunks.
    """

    def __init__(self, heads: int, channels: int, *, lowest: float, rngs: nnx.Rngs):
        self.lowest = lowest
        zeros = nnx.initializers.zeros_init()
        self.log_rate = parameter(rngs, zeros, (heads,), axes=("heads",), **NO_DECAY)
        steps = step_size_bias(0.001, 0.1, 1e-4)
        self.bias = parameter(rngs, steps, (heads, channels), axes=("heads", None), **NO_DECAY)

    def __call__(self, f: Float[Array, "b t h k"]) -> Float[Array, "b t h k"]:
        """Returns the log-decay per channel."""
        rate = jnp.exp(self.log_rate[...])[None, None, :, None]
        return self.lowest * jax.nn.sigmoid(rate * (f.astype(jnp.float32) + self.bias[...][None, None]))
