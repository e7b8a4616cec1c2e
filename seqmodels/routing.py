"""Tokens that pass layers by in training: TREAD (Krause et al. 2025, arXiv:2501.04765)."""

import dataclasses

import jax
import jax.numpy as jnp

from layers.segments import Segments
from layers.typing import Array, Float, Int, Key


def kept_tokens(
    key: Key[Array, ""], shape: tuple[int, int], segments: Segments | None, rate: float
) -> Int[Array, "b n"]:
    """Returns which tokens of each row go through the layers, in order: t - floor(rate t), drawn at random, padding last."""
    b, t = shape
    draws = jax.random.uniform(key, (b, t))
    if segments is not None:
        draws = jnp.where(segments.real, draws, 2.0)
    return jnp.sort(jnp.argsort(draws, axis=1)[:, : t - int(rate * t)], axis=1).astype(jnp.int32)


def taken(x: Float[Array, "b t d"], kept: Int[Array, "b n"]) -> Float[Array, "b n d"]:
    """Returns the tokens of x that are kept."""
    return jnp.take_along_axis(x, kept[..., None], axis=1)


def returned(
    x: Float[Array, "b t d"], y: Float[Array, "b n d"], kept: Int[Array, "b n"]
) -> Float[Array, "b t d"]:
    """Returns x with y in the places of the tokens that are kept."""
    return x.at[jnp.arange(x.shape[0])[:, None], kept].set(y)


def kept_segments(kept: Int[Array, "b n"], time: int, segments: Segments | None) -> tuple[Segments, Segments]:
    """Returns the segments of the tokens that are kept: as rows of their own, and with the positions that they had.

    The first are for mixers that go by neighbours, the second for those whose every use of a position is its number.

    Raises:
      ValueError: the tokens are not evenly spaced.
    """
    if segments is not None and segments.intervals is not None:
        raise ValueError("route is given, and intervals between tokens; expected one of the two")
    if segments is None:
        positions = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32)[None], (kept.shape[0], time))
        own = Segments.of(jnp.ones(kept.shape, jnp.int32), packed=False)
    else:
        positions = segments.positions
        own = Segments.of(jnp.take_along_axis(segments.numbers, kept, axis=1), packed=segments.packed)
    placed = dataclasses.replace(own, positions=jnp.take_along_axis(positions, kept, axis=1), packed=True)
    return own, placed
