"""Cosines and sines of angles that grow with the position."""

import math

import jax.numpy as jnp
import numpy as np

from layers.typing import Array, Float, Int

BITS = 12


def cos_sin(
    positions: Int[Array, "b t"], frequencies: np.ndarray
) -> tuple[Float[Array, "b t k"], Float[Array, "b t k"]]:
    """Returns cosine and sine of position * frequency, float32, to about 1e-6 for positions up to 2^24.

    A product in float32 is wrong by a tenth of a turn at a million tokens. Positions are therefore split into two numbers
    of 12 bits, and the factor of each into 12 bits and a remainder: the large products are exact, and the addition
    theorems join them.

    Args:
      positions: positions of the tokens.
      frequencies: angles per token, float64, (k,).
    """
    high, low = (x[..., None].astype(jnp.float32) for x in (positions >> BITS, positions & ((1 << BITS) - 1)))
    jump = np.mod((1 << BITS) * frequencies + math.pi, 2 * math.pi) - math.pi
    (coarse_jump, fine_jump), (coarse, fine) = _split(jump), _split(frequencies)
    rest = high * fine_jump + low * fine
    cos, sin = jnp.cos(rest), jnp.sin(rest)
    for angle in (high * coarse_jump, low * coarse):
        c, s = jnp.cos(angle), jnp.sin(angle)
        cos, sin = cos * c - sin * s, sin * c + cos * s
    return cos, sin


def _split(angles):
    """Returns angles (1, 1, k) as 12 significant bits and the remainder, both float32."""
    mantissa, exponent = np.frexp(angles)
    coarse = np.ldexp(np.round(mantissa * 2**BITS) / 2**BITS, exponent)
    return tuple(jnp.asarray(part, jnp.float32)[None, None] for part in (coarse, angles - coarse))
