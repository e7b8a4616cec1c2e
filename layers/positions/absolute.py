"""Absolute positions as vectors to add to embeddings."""

import jax.numpy as jnp
import numpy as np

from layers.positions.angles import cos_sin
from layers.typing import Array, Float, Int


def sinusoidal(positions: Int[Array, "b t"], width: int, base: float = 10_000.0) -> Float[Array, "b t d"]:
    """Returns alternating sines and cosines (Vaswani et al. 2017, arXiv:1706.03762).

        y_{2i} = sin(position base^(-2i/d)),  y_{2i+1} = cos(position base^(-2i/d))

    Args:
      positions: positions of the tokens, from 0.
      width: d, number of features; an odd width ends with a sine.
      base: base of the frequencies; the slowest pair repeats after about 2 pi base tokens.
    """
    frequencies = base ** (-np.arange(0, width, 2) / width)
    cos, sin = cos_sin(positions, frequencies)
    pairs = jnp.stack([sin, cos], axis=-1)
    return pairs.reshape(*positions.shape, 2 * frequencies.size)[..., :width]
