"""Tokens that pass layers by in training: TREAD (Krause et al. 2025, arXiv:2501.04765)."""

import jax
import jax.numpy as jnp

from layers.segments import Segments
from layers.typing import Array, Int, Key


def kept_tokens(
    key: Key[Array, ""], shape: tuple[int, int], segments: Segments | None, rate: float
) -> Int[Array, "b n"]:
    """Returns which tokens of each row go through the layers, in order: t - floor(rate t), drawn at random, padding last."""
    b, t = shape
    draws = jax.random.uniform(key, (b, t))
    if segments is not None:
        draws = jnp.where(segments.real, draws, 2.0)
    return jnp.sort(jnp.argsort(draws, axis=1)[:, : t - int(rate * t)], axis=1).astype(jnp.int32)
