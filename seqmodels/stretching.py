"""Positions of longer sequences in training: drawn in order, with gaps (Ruoss et al. 2023, arXiv:2305.16843; CLEX)."""

import dataclasses

import jax
import jax.numpy as jnp

from layers.segments import Segments
from layers.typing import Array, Int, Key


def stretched_positions(key: Key[Array, ""], rows: int, time: int, stretch: int) -> Int[Array, "b t"]:
    """Returns positions of t tokens in sequences as long as t s, with s drawn per row from 1, ..., `stretch`.

    The first is 0 and the last t s - 1. Those between are drawn without repetition, all subsets being as likely, and sorted. This is
    CLEX's training (Chen et al. 2023, arXiv:2310.16450), which draws one s per batch.
    """
    if time < 2 or stretch == 1:
        return jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32)[None], (rows, time))
    factors, order = jax.random.split(key)
    last = time * jax.random.randint(factors, (rows, 1), 1, stretch + 1) - 1
    draws = jax.random.uniform(order, (rows, time * stretch - 2))
    draws = jnp.where(jnp.arange(1, time * stretch - 1)[None] < last, draws, -1.0)
    between = jnp.sort(jax.lax.top_k(draws, time - 2)[1], axis=1) + 1
    return jnp.concatenate([jnp.zeros_like(last), between, last], axis=1).astype(jnp.int32)


def stretched(
    key: Key[Array, ""], shape: tuple[int, int], segments: Segments | None, stretch: int
) -> Segments:
    """Returns the segments with stretched positions, counted from 0 in each of them, for mixers that take gaps."""
    drawn = stretched_positions(key, *shape, stretch)
    if segments is None:
        whole = Segments.of(jnp.ones(shape, jnp.int32), padding="end", packed=False)
        return dataclasses.replace(whole, positions=drawn, packed=True)
    rows = jnp.arange(shape[0])[:, None]
    first = jnp.full((shape[0], shape[1] + 1), jnp.iinfo(jnp.int32).max)
    first = first.at[rows, segments.numbers].min(drawn)[rows, segments.numbers]
    return dataclasses.replace(segments, positions=drawn - first, packed=True)
