"""Segments: several sequences packed into one row, and padding.

`segment_ids` is an integer array (b, t). 0 is padding: such a token changes no state and is seen by no other. The
other tokens of a row form segments, maximal runs of equal ids with the padding left out; tokens of different segments
do not see each other. An initial state belongs to the segment of the first real token of the row.

Every layer needs the same facts about the ids: numbers, positions, starts. `Segments` holds them, derived once per call of
a model. Every function that takes `segment_ids` takes `Segments` in their place.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from layers.typing import Array, Bool, Float, Int, Num

Padding = Literal["anywhere", "end"]


@dataclasses.dataclass(frozen=True)
class Segments:
    """Segment ids and the facts derived from them. `Segments.of` makes one.

    Attributes:
      ids: as given, (b, t).
      numbers: 1, 2, ... for the tokens of the first, second, ... segment of each row, and 0 for padding: two real tokens
        share a segment if and only if their numbers agree.
      positions: the number of earlier real tokens of the same segment.
      starts: True at the first token of every segment but the row's first, where a state is reset.
      padding: "end" if padding stands only behind all real tokens of its row; static. The neighbours of a token are then
        adjacent to it, so that shifts and masks replace gathers.
      packed: False if no row holds more than one segment, and then `starts` is False everywhere; or the most segments of a
        row, or True if that number is unknown. Static.
      intervals: the time from the token before to each token, in units of the usual distance of tokens; None if they are
        evenly spaced.
      gates: added to all logits of a token as a key, by mixers that take them; None for none (see `layers.reduction.DeletionGate`).
    """

    ids: Int[Array, "b t"]
    numbers: Int[Array, "b t"]
    positions: Int[Array, "b t"]
    starts: Bool[Array, "b t"]
    padding: Padding = "anywhere"
    packed: bool | int = True
    intervals: Float[Array, "b t"] | None = None
    gates: Float[Array, "b t"] | None = None

    @classmethod
    def of(
        cls,
        segment_ids: "SegmentIds",
        *,
        padding: Padding = "anywhere",
        packed: bool | int = True,
        intervals: Float[Array, "b t"] | None = None,
    ) -> "Segments | None":
        """Returns `segment_ids` as `Segments`; `Segments`, and None without intervals, come back unchanged.

        Args:
          segment_ids: (b, t), integers. None with `intervals` stands for rows of one segment each.
          padding, packed: what is known of the ids beforehand. They are trusted: wrong ones give wrong results.
            `packed=1` is `packed=False`.
          intervals: for rows that are not evenly spaced in time, such as observations of a signal: the time since the token
            before, in units of the usual distance. Mixers that cannot take it refuse it.

        Raises:
          ValueError: `padding` is not "anywhere" or "end", or `packed` is below 1, or intervals and ids differ in shape.
        """
        if padding not in ("anywhere", "end"):
            raise ValueError(f"padding={padding!r}; expected 'anywhere' or 'end'")
        if not isinstance(packed, bool):
            if packed < 1:
                raise ValueError(
                    f"packed={packed}; expected a bool, or the most segments of a row, at least 1"
                )
            packed = packed > 1 and packed
        if intervals is not None:
            ids = jnp.ones(intervals.shape, jnp.int32) if segment_ids is None else segment_ids
            if ids.shape != intervals.shape:
                raise ValueError(
                    f"intervals have shape {intervals.shape}; expected {ids.shape}, that of the ids"
                )
            whole = dict(padding="end", packed=False) if segment_ids is None else {}
            made = cls.of(ids, **dict(padding=padding, packed=packed) | whole)
            return dataclasses.replace(made, intervals=jnp.where(made.real, intervals, 0.0))
        if segment_ids is None or isinstance(segment_ids, Segments):
            return segment_ids
        segment_ids = jnp.asarray(segment_ids)
        real = segment_ids != 0
        count = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
        if not packed:
            numbers, positions = real.astype(jnp.int32), jnp.maximum(count, 0)
            return cls(segment_ids, numbers, positions, jnp.zeros_like(real), padding, packed)
        starts = _starts_at_end(segment_ids) if padding == "end" else _starts_anywhere(segment_ids)
        numbers = jnp.where(real, 1 + jnp.cumsum(starts, axis=1, dtype=jnp.int32), 0)
        first = jax.lax.cummax(jnp.where(starts, count, 0), axis=1)
        return cls(segment_ids, numbers, jnp.maximum(count - first, 0), starts, padding, packed)

    @property
    def real(self) -> Bool[Array, "b t"]:
        """True for tokens, False for padding."""
        return self.ids != 0

    @property
    def most(self) -> int | None:
        """The most segments of a row, or None if that is unknown; static."""
        return None if self.packed is True else int(self.packed) or 1

    @property
    def shape(self) -> tuple[int, int]:
        """(b, t)."""
        return self.ids.shape

    def cut(self, start: int, stop: int) -> "Segments":
        """The segments of tokens `start` to `stop`, renumbered."""
        gaps = None if self.intervals is None else self.intervals[:, start:stop]
        found = Segments.of(self.ids[:, start:stop], padding=self.padding, packed=self.packed, intervals=gaps)
        return found if self.gates is None else dataclasses.replace(found, gates=self.gates[:, start:stop])


SegmentIds = Int[Array, "b t"] | Segments | None

_ARRAYS, _STATIC = ("ids", "numbers", "positions", "starts", "intervals", "gates"), ("padding", "packed")


def _flatten_with_keys(segments):
    arrays = [(jax.tree_util.GetAttrKey(name), getattr(segments, name)) for name in _ARRAYS]
    return arrays, tuple(getattr(segments, name) for name in _STATIC)


def _unflatten(static, arrays):
    """Skips `__init__`, which checks types: JAX also builds trees of placeholders, such as specs."""
    segments = object.__new__(Segments)
    for name, value in zip((*_ARRAYS, *_STATIC), (*arrays, *static), strict=True):
        object.__setattr__(segments, name, value)
    return segments


jax.tree_util.register_pytree_with_keys(Segments, _flatten_with_keys, _unflatten)


def _starts_at_end(ids):
    before = jnp.pad(ids, ((0, 0), (1, 0)))[:, :-1]
    return (ids != 0) & (before != 0) & (ids != before)


def _starts_anywhere(ids):
    before = jnp.pad(last_real_id(ids), ((0, 0), (1, 0)))[:, :-1]
    return (ids != 0) & (before != 0) & (ids != before)


def last_real_id(segment_ids: Int[Array, "b t"], before: Int[Array, "b"] | None = None) -> Int[Array, "b t"]:
    """The id of the last real token up to and including each position, (b, t); before the first, `before` (b) or 0."""
    time = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    index = jax.lax.cummax(jnp.where(segment_ids != 0, time[None], -1), axis=1)
    ids = jnp.take_along_axis(segment_ids, jnp.maximum(index, 0), axis=1)
    first = jnp.zeros(segment_ids.shape[:1], segment_ids.dtype) if before is None else before
    return jnp.where(index >= 0, ids, first[:, None])


def select_real(x: Num[Array, "#b #t *f"], segment_ids: SegmentIds) -> Num[Array, "..."]:
    """x where there are tokens, and zero at padding, whatever stands there; axes of size 1 stand for all."""
    if segment_ids is None:
        return x
    real = segment_ids.real if isinstance(segment_ids, Segments) else segment_ids != 0
    return jnp.where(jnp.expand_dims(real, tuple(range(2, x.ndim))), x, 0)


def reset_mask(segments: Segments, reverse: bool = False) -> Bool[Array, "b t"] | None:
    """Where a state is reset, with time running backward if `reverse`; None if that is nowhere, statically."""
    if not segments.packed:
        return None
    if not reverse:
        return segments.starts
    none = jnp.iinfo(segments.numbers.dtype).max
    numbers = jnp.where(segments.real, segments.numbers, none)
    following = jax.lax.cummin(numbers, axis=1, reverse=True)
    following = jnp.pad(following, ((0, 0), (0, 1)), constant_values=none)[:, 1:]
    return segments.real & (following != none) & (following != segments.numbers)
