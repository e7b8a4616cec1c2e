"""The cache of past keys and values, or of what they are computed from.

Each row has `sinks` slots for the first tokens of its current segment and further slots for the rest: one per expected
token, filled in order, or with a window one per token of the window, used cyclically.
"""

from typing import NamedTuple

import jax.numpy as jnp

from layers.segments import Visit
from layers.typing import Array, Bool, Float, Int, Num


class Cache(NamedTuple):
    """A cache with slots `s` per row.

    Attributes:
      entries: arrays stored per token.
      numbers: number of the segment in its row that a slot belongs to, from 1; 0 is empty.
      positions: position of the slot's token within its segment.
      length: number of real tokens seen per row.
      frequencies: angles per token by which keys are turned, where they depend on the length of rows (CLEX); None elsewhere.
    """

    entries: tuple[Num[Array, "b s *_f"], ...]
    numbers: Int[Array, "b s"]
    positions: Int[Array, "b s"]
    length: Int[Array, "b"]
    frequencies: Float[Array, "b _k"] | None = None


class Seen(NamedTuple):
    """The entries that new tokens may attend to: cached and new entries (b, s, ...), their segments and positions."""

    entries: tuple[Num[Array, "b s *_f"], ...]
    numbers: Int[Array, "b s"]
    positions: Int[Array, "b s"]


def empty_cache(
    mixer: str,
    batch_size: int,
    shapes: tuple[tuple[int, ...], ...],
    dtype,
    *,
    max_length: int | None,
    window: int | None = None,
    sinks: int = 0,
) -> Cache:
    """Returns an empty cache of entries of these shapes (without batch and slots).

    Raises:
      ValueError: neither a window nor max_length bounds the slots.
    """
    if max_length is None and window is None:
        raise ValueError(
            f"max_length=None, but the cache of {mixer} holds all tokens; expected the most tokens that it will hold"
        )
    slots = max_length if window is None else sinks + window
    entries = tuple(jnp.zeros((batch_size, slots, *shape), dtype) for shape in shapes)
    empty = jnp.zeros((batch_size, slots), jnp.int32)
    return Cache(entries, empty, empty, jnp.zeros(batch_size, jnp.int32))


def extend(
    cache: Cache,
    new: tuple[Num[Array, "b t *_f"], ...],
    visit: Visit,
    *,
    window: int | None = None,
    sinks: int = 0,
) -> tuple[Cache, Seen, Bool[Array, "b t"]]:
    """Writes new tokens into the cache.

    Args:
      new: entries of the new tokens.
      visit: how the new tokens continue each row.
      window, sinks: as in `empty_cache`.

    Returns:
      The cache, the entries that the new tokens may attend to, and which new tokens found no slot.
    """
    numbers, positions, slots = visit.numbers, visit.positions, cache.numbers.shape[1]
    real = numbers != 0
    count = cache.length[:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
    length = cache.length + real.sum(1, dtype=jnp.int32)
    if window is None:
        index = jnp.where(real, count, slots)
        beyond = real & (count >= slots)
    else:
        # Keeps the first tokens of the row's current segment and the last tokens of all.
        sink = real & (positions < sinks) & (numbers == visit.place.number[:, None])
        recent = real & (positions >= sinks) & (count >= length[:, None] - window)
        index = jnp.where(recent, sinks + count % window, slots)
        index = jnp.where(sink, positions, index)
        beyond = jnp.zeros_like(real)
    rows = jnp.arange(real.shape[0])[:, None]
    old, fresh = (
        Seen(cache.entries, cache.numbers, cache.positions),
        Seen(tuple(x.astype(e.dtype) for x, e in zip(new, cache.entries, strict=True)), numbers, positions),
    )

    def put(into, x):
        return into.at[rows, index].set(x, mode="drop")

    def join(before, x):
        return jnp.concatenate([before, x], axis=1)

    written = Seen(
        tuple(map(put, old.entries, fresh.entries)),
        put(old.numbers, numbers),
        put(old.positions, positions),
    )
    # A ring overwrites entries that early queries of a long call still need: they read the old and the new entries.
    seen = written
    if window is not None:
        seen = Seen(
            tuple(map(join, old.entries, fresh.entries)),
            join(old.numbers, numbers),
            join(old.positions, positions),
        )
    return Cache(*written, length, cache.frequencies), seen, beyond
