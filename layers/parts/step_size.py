"""Step sizes of discretized state spaces: initial values of the bias inside their softplus."""

import math

import jax
import jax.numpy as jnp

from layers.parameters import Initializer
from layers.typing import Array, Float


def inverse_softplus(y: Float[Array, "*a"]) -> Float[Array, "*a"]:
    """Returns x with softplus(x) = y: log(exp(y) - 1), without a difference of nearly equal numbers."""
    return y + jnp.log(-jnp.expm1(-y))


def step_size_bias(low: float, high: float, floor: float = 0.0) -> Initializer:
    """Initializer of b with softplus(b) log-uniform in [low, high] and at least `floor`."""

    def init(key, shape, dtype):
        logarithm = jax.random.uniform(key, shape, dtype, math.log(low), math.log(high))
        return inverse_softplus(jnp.maximum(jnp.exp(logarithm), floor))

    return init
