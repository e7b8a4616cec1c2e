"""Filters given by a small network of the position: as long as they are asked for, with parameters that do not grow."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from layers.parameters import NO_DECAY, parameter
from layers.typing import Array, Float

# Channels decay to 1% within shares of max_length that run from the slowest channel's to the fastest one's.
SLOW, FAST, TARGET = 1.5, 0.3, 1e-2


class ImplicitFilter(nnx.Module):
    """Hyena's filters (Poli et al. 2023, arXiv:2302.10866).

        k_l = (exp(-tau |delta|) + shift) * (W_3 sin(w (W_2 sin(w (W_1 sin(w (W_0 z_l + b_0)) + b_1)) + b_2)))
        z_l = [tau, cos(f theta), -sin(f theta)],  tau = l / (L - 1),  theta = 2 pi l / L

    with frequencies f from 1e-4 to K - 1, (features - 1) / 2 = K of them; w, one a hidden unit, is common to the three sines
    and trained; the decays delta are fixed, evenly spaced over the channels. Nothing here is decayed by the optimizer.

    Weights start normal with deviation 0.02 and biases at zero, as the authors' models draw all linear maps, filters
    included. Drawn from +-1/sqrt(inputs) and with w = 14, gradients of W_0 are some hundred times those of the rest of
    a model: every sine multiplies them by w.
    """

    def __init__(
        self,
        channels: int,
        length: int,
        *,
        features: int,
        hidden: int,
        sine_frequency: float,
        shift: float,
        rngs: nnx.Rngs,
    ):
        self.channels, self.length, self.features, self.shift = channels, length, features, shift
        sizes = [features, hidden, hidden, hidden]
        self.weights = nnx.List(
            parameter(rngs, nnx.initializers.normal(0.02), (a, b), **NO_DECAY)
            for a, b in zip(sizes, [*sizes[1:], channels], strict=True)
        )
        zeros = nnx.initializers.zeros_init()
        self.biases = nnx.List(parameter(rngs, zeros, (hidden,), **NO_DECAY) for _ in range(3))
        self.frequency = parameter(rngs, nnx.initializers.constant(sine_frequency), (hidden,), **NO_DECAY)

    def __call__(self, length: int) -> Float[Array, "d l"]:
        """The first `length` taps of every channel, float32."""
        h = self.positions(length)
        for weight, bias in zip(self.weights[:3], self.biases, strict=True):
            h = jnp.matmul(h, weight[...], precision=jax.lax.Precision.HIGHEST) + bias[...][None]
            h = jnp.sin(self.frequency[...][None] * h)
        h = jnp.matmul(h, self.weights[3][...], precision=jax.lax.Precision.HIGHEST)
        slow, fast = math.log(TARGET) / SLOW, math.log(TARGET) / FAST
        decay = jnp.abs(jnp.linspace(slow, fast, self.channels))[None]
        return (h * (jnp.exp(-self._share(length) * decay) + self.shift)).T

    def positions(self, length: int) -> Float[Array, "l f"]:
        """z_l for l < `length`."""
        count = (self.features - 1) // 2
        frequencies = 2 * math.pi * jnp.linspace(1e-4, count - 1, count)
        turn = jnp.arange(length)[:, None] / self.length * frequencies[None]
        return jnp.concatenate([self._share(length), jnp.cos(turn), -jnp.sin(turn)], axis=1)

    def _share(self, length):
        """tau of every step, as a column."""
        return jnp.arange(length, dtype=jnp.float32)[:, None] / max(1, self.length - 1)
