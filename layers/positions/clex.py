"""CLEX: frequencies of rotary positions that follow a learned differential equation (Chen et al. 2023, arXiv:2310.16450)."""

import math
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.options import Bound, checked_dataclass
from layers.parameters import parameter
from layers.segments import Segments
from layers.typing import Array, Float, Int


@checked_dataclass
class Clex:
    """Options of `ClexFrequencies`.

    Attributes:
      length: length of training sequences, at which the frequencies are those of plain RoPE.
      max_factor: largest ratio of lengths that has frequencies of its own; longer sequences have those of this one.
      base: base of plain RoPE. The authors' code takes 10,000 inside the equation whatever the base of the model is; here it is this one.
      expand: number of hidden units per feature of a head.
      activation: activation of the hidden units.
      steps: steps of the solver between two whole factors. The authors have 100, and solve once for all layers.
    """

    length: Annotated[int, Bound(least=1)]
    max_factor: Annotated[int, Bound(least=1)] = 16
    base: float = 10_000.0
    expand: Annotated[int, Bound(least=1)] = 1
    activation: Literal["tanh", "silu"] = "tanh"
    steps: Annotated[int, Bound(least=1)] = 10

    def __post_init__(self) -> None:
        if self.base <= 1:
            raise ValueError(f"base={self.base}; expected more than 1")

    def size(self, features: int) -> int:
        """Returns the number of features per head, all of which are rotated.

        Raises:
          ValueError: it is odd, or there are fewer than four.
        """
        if features % 2 or features < 4:
            raise ValueError(f"position 'clex' needs an even head size of at least 4, got {features}")
        return features

    def factor(self, length: Int[Array, "*s"] | int) -> Int[Array, "*s"]:
        """Returns the whole factor of sequences of `length` tokens: ceil(length / trained length), from 1 to `max_factor`."""
        return jnp.clip(-(-jnp.asarray(length) // self.length), 1, self.max_factor)


class ClexFrequencies(nnx.Module):
    """The angles per token of each of the k/2 pairs of features, for each factor s = 1, 2, ... of the trained length.

        z(1) = log theta,   theta_i = base^(-2i/k),   i = 0, ..., k/2 - 1
        dz/ds = W_d act(W_u (z + log theta^ntk(s))) + d/ds log theta^ntk(s)
        theta^ntk_i(s) = theta_i (2s - 1)^(-2i/(k - 2)),   d/ds log theta^ntk_i(s) = -4i / ((k - 2) (2s - 1))

    The angles are exp z(s), solved with the 3/8 rule, a Runge-Kutta method of fourth order. W_d starts at zero, where z(s) is log theta^ntk(s),
    RoPE with a raised base.
    """

    def __init__(self, config: Clex, size: int, *, rngs: nnx.Rngs):
        self.config = config
        pairs, hidden = size // 2, config.expand * size

        def uniform(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -1, 1) / math.sqrt(hidden)

        self.up = parameter(rngs, uniform, (pairs, hidden))
        self.down = parameter(rngs, nnx.initializers.zeros_init(), (hidden, pairs))

    def __call__(self) -> Float[Array, "f k"]:
        """Returns the angles for s = 1, ..., max_factor, float32."""
        config, pairs = self.config, self.up.shape[0]
        index = np.arange(pairs, dtype=np.float32)
        slope = -2 * index / max(2 * pairs - 2, 1)
        start = -index / pairs * math.log(config.base)
        act = {"tanh": jnp.tanh, "silu": jax.nn.silu}[config.activation]
        up, down = (w[...].astype(jnp.float32) for w in (self.up, self.down))

        def derivative(s, z):
            a = 2 * s - 1
            return act((z + start + slope * jnp.log(a)) @ up) @ down + 2 * slope / a

        h = 1 / config.steps

        def step(z, number):
            s = 1 + number * h
            one = derivative(s, z)
            two = derivative(s + h / 3, z + h * one / 3)
            three = derivative(s + 2 * h / 3, z + h * (two - one / 3))
            four = derivative(s + h, z + h * (one - two + three))
            return z + h * (one + 3 * (two + three) + four) / 8, None

        def to_next_factor(z, number):
            numbers = number * config.steps + jnp.arange(config.steps, dtype=jnp.float32)
            z, _ = jax.lax.scan(step, z, numbers)
            return z, z

        first = jnp.asarray(start, jnp.float32)
        _, rest = jax.lax.scan(to_next_factor, first, jnp.arange(config.max_factor - 1, dtype=jnp.float32))
        return jnp.exp(jnp.concatenate([first[None], rest]))

    def of_tokens(self, positions: Int[Array, "#b t"], segments: Segments | None) -> Float[Array, "#b _ _"]:
        """Returns the angles for each token: those of the last position of its segment, hence one factor per segment."""
        if segments is None:
            last = positions.max(axis=1, keepdims=True, initial=0)
        else:
            rows = jnp.arange(positions.shape[0])[:, None]
            last = jnp.zeros((positions.shape[0], positions.shape[1] + 1), jnp.int32)
            last = last.at[rows, segments.numbers].max(positions)[rows, segments.numbers]
        return self()[self.config.factor(last + 1) - 1]


def rotated(
    x: Float[Array, "b t h k"], positions: Int[Array, "#b t"], frequencies: Float[Array, "#b #t _"]
) -> Float[Array, "b t h k"]:
    """Returns x with each pair (x_i, x_{i + k/2}) rotated by position * frequency, computed in float32."""
    angles = (positions[..., None].astype(jnp.float32) * frequencies)[:, :, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
