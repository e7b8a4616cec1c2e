"""Rows of which some tokens are left out, in order: what belongs to the others, and how they return."""

import dataclasses

import jax.numpy as jnp

from layers.segments import Segments
from layers.typing import Array, Bool, Int, Num


def places_of(kept: Bool[Array, "b t"], size: int) -> Int[Array, "b n"]:
    """Returns the places of the first `size` kept tokens of each row, in order; t where a row has fewer."""
    b, t = kept.shape
    put = jnp.where(kept, jnp.cumsum(kept, axis=1) - 1, size)
    every = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None], (b, t))
    return jnp.full((b, size), t, jnp.int32).at[jnp.arange(b)[:, None], put].set(every, mode="drop")


def taken(x: Num[Array, "b t *f"], kept: Int[Array, "b n"], fill: int = 0) -> Num[Array, "b n *f"]:
    """Returns what x holds for the kept tokens, such as vectors or labels; `fill` where there is none."""
    return x.at[jnp.arange(x.shape[0])[:, None], kept].get(mode="fill", fill_value=fill)


def returned(
    x: Num[Array, "b t *f"], y: Num[Array, "b n *f"], kept: Int[Array, "b n"]
) -> Num[Array, "b t *f"]:
    """Returns x with y in the places of the tokens that are kept."""
    return x.at[jnp.arange(x.shape[0])[:, None], kept].set(y, mode="drop")


def kept_segments(kept: Int[Array, "b n"], time: int, segments: Segments | None) -> tuple[Segments, Segments]:
    """Returns the segments of the tokens that are kept: as rows of their own, and with the positions that they had.

    The first are for mixers that go by neighbours, the second for those whose every use of a position is its number. Both keep the
    numbers of segments, also of those behind a segment that loses all its tokens: the n-th segment of a target reads the n-th of
    its source.

    Raises:
      ValueError: the tokens are not evenly spaced.
    """
    if segments is not None and segments.intervals is not None:
        raise ValueError(
            "tokens leave (route, or a deletion gate), and there are intervals between tokens; expected one of the two"
        )
    if segments is None:
        positions = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32)[None], (kept.shape[0], time))
        own = Segments.of((kept < time).astype(jnp.int32), packed=False)
    else:
        positions = segments.positions
        numbers = taken(segments.numbers, kept)
        own = dataclasses.replace(Segments.of(numbers, packed=segments.packed), numbers=numbers)
    return own, placed(own, taken(positions, kept))


def placed(segments: Segments | None, positions: Int[Array, "b n"]) -> Segments:
    """Returns segments at these positions, which rise but may have gaps, for mixers whose every use of a position is its number.

    Args:
      segments: None for rows of one segment each, without padding.
    """
    if segments is None:
        segments = Segments.of(jnp.ones(positions.shape, jnp.int32), padding="end", packed=False)
    return dataclasses.replace(segments, positions=positions, packed=True)
