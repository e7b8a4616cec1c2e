"""The contract of mixers as a base class: layers that move information along time.

    y, state = mixer(x, state=None, *, segment_ids=None)     # x: b t d, any t, 0 and 1 included
    state = mixer.init_state(batch_size, max_length=None)    # a pytree, batch axis first

With `state=None` nothing is carried, and None comes back. Given a state, the next state comes back: prefill, chunked
prefill and decoding are one call, and wherever a sequence is cut the outputs are the same. Packed sequences give what
they give one by one, and padding reaches no output, no state and no gradient. A mixer is causal, so that the derivative
of y_t by x_s is zero for s > t, or sets `causal = False` and refuses a state.

A mixer writes `mix`, its equation, and `initial`, what it carries before the first token. The base class does the rest.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layers.caches.state import CacheState
from layers.kernels.isolation import isolated_tokens
from layers.kernels.promotion import promoting
from layers.segments import (
    Place,
    SegmentIds,
    Segments,
    Visit,
    initial_place,
    keep_where,
    select_real,
    visit,
)
from layers.typing import Array, Float, Int

# Patterns of mixers with an option for either direction, and of those that also read a source.
SELF = ("causal_self", "noncausal_self")
EVERY = (*SELF, "causal_cross", "noncausal_cross")


class MixerState(NamedTuple):
    """What a mixer carries from call to call.

    Attributes:
      carried: what the mixer's `initial` and `mix` return.
      place: where the rows of the batch stand.
    """

    carried: Any
    place: Place


class Source(NamedTuple):
    """What a cross-attention reads, computed once per source.

    Attributes:
      entries: arrays per token of the source, such as keys and values.
      numbers: the segment of each token, counted from 1; 0 is padding. The n-th segment of a target reads the n-th of the source.
      gates: added to the logits of each token; None for none.
    """

    entries: Any
    numbers: Int[Array, "b s"]
    gates: Float[Array, "b s"] | None = None


class Mixer(nnx.Module):
    """Base class of mixers.

    A mixer sets `self.config`, whose `width` is d, and defines

        initial(batch_size, max_length)        what is carried before the first token: a pytree, batch axis first
        mix(x, carried, segments)              y (b, t, d) and what to carry to the next call

    In `mix`, `segments` is a `Segments` or None, and `carried` is None or belongs to the segment of the first real token
    of each row: rows that begin another segment find what `initial` returns. The second value that `mix` returns is ignored
    if `carried` is None.

    Attributes:
      causal: whether no output depends on later inputs; False where the mixer needs the whole sequence.
      takes_intervals: whether `mix` reads `segments.intervals`, the times between tokens; others refuse them.
      keeps_segments: True for a mixer that distinguishes segments in what it carries, such as a cache. Then nothing is
        cleared where a segment begins, and `mix(x, carried, segments, visit)` gets a `Visit`, None if `carried` is None.
      isolates_tokens: True for a causal mixer in whose equation itself a token meets later ones, in steps or sums of its own:
        then no number that is not finite reaches `mix` (see `layers.kernels.isolation`, which primitives do by themselves).
      shares_values: True for a mixer whose values later layers may read, as in RWKV-7. It also defines `mix_sharing(x, carried,
        segments, values)`, which returns the outputs, what to carry, and the values for later layers (b, t, d); `values` are
        those of earlier ones or None.
      takes_values: whether it needs the values of an earlier layer.
      patterns: the uses that options can give it, of "causal_self", "noncausal_self", "causal_cross" and "noncausal_cross", the four of
        CAB (Zhang et al. 2023, arXiv:2210.07661). In the latter two, queries of the target read keys of a source, all of them; the target is
        causal in the former. A mixer that has them defines `entries_of(y, segments)`, what `Source` holds of a source y (b, s, d), and
        `read(x, source, numbers)`, the outputs (b, t, d) for targets x, whose segments `numbers` counts.
      reads_lengths: whether outputs depend on the number of tokens of a segment, so that `mix` must know of padding behind it.
      takes_gates: whether `segments.gates` are added to the logits of keys, also in `cross`; others refuse them.
      takes_gaps: whether positions of a segment may have gaps, because all that `mix` does with them is to compare or encode them.
    """

    causal: bool = True
    patterns: ClassVar[tuple[str, ...]] = ("causal_self",)
    takes_intervals: bool = False
    keeps_segments: bool = False
    isolates_tokens: bool = False
    shares_values: bool = False
    takes_values: bool = False
    reads_lengths: bool = False
    takes_gates: bool = False
    takes_gaps: bool = False

    def initial(self, batch_size: int, max_length: int | None) -> Any:
        """Returns what is carried before the first token; `max_length` bounds the tokens that a cache must hold."""
        raise NotImplementedError(f"{type(self).__name__} is causal and defines no initial()")

    def mix(
        self, x: Float[Array, "b t d"], carried: Any, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], Any]:
        """Returns the outputs of the mixer's equation, and what to carry."""
        raise NotImplementedError(f"{type(self).__name__} defines no mix()")

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> MixerState:
        """Returns the state before the first token.

        Args:
          batch_size: b.
          max_length: the most tokens per row, for mixers whose state grows with them; others ignore it.

        Raises:
          ValueError: the mixer is not causal, or needs `max_length` and it is None.
        """
        self._require_causal("init_state was called")
        return MixerState(self.initial(batch_size, max_length), initial_place(batch_size))

    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: MixerState | None = None,
        *,
        segment_ids: SegmentIds = None,
    ) -> tuple[Float[Array, "b t d"], MixerState | None]:
        """Returns the outputs along time and the next state.

        Args:
          x: inputs (b, t, d), any t.
          state: from `init_state` or an earlier call; None carries nothing.
          segment_ids: (b, t) integers or `Segments`, see `layers.kernels.segments`; without them each row is one segment.

        Returns:
          The outputs (b, t, d), and the state after the last token, None if none was given.

        Raises:
          ValueError, TypeError: a shape or type does not fit, a mixer that is not causal is given a state, or the state
            belongs to another batch size or mixer, or its parts to different lengths of cache, or a size of x is a symbol
            of `jax.export` where the mixer needs a number.
        """
        y, state, _ = self.sharing(x, state, None, segment_ids=segment_ids)
        return y, state

    def sharing(
        self,
        x: Float[Array, "b t d"],
        state: MixerState | None,
        values: Float[Array, "b t d"] | None,
        *,
        segment_ids: SegmentIds = None,
    ) -> tuple[Float[Array, "b t d"], MixerState | None, Float[Array, "b t d"] | None]:
        """Returns what `__call__` returns, and the values that later layers read.

        Args:
          values: values of the first layer that shares them, for the same tokens; None if there is none before this one.

        Returns:
          The outputs, the next state, and the values: those given, or the mixer's own if it is the first to share them.

        Raises:
          ValueError, TypeError: as for `__call__`, or the mixer needs the values of an earlier layer.
        """
        self._check(x, segment_ids)
        segments = Segments.of(segment_ids)
        # Whatever stands at padding, products with weights must not meet it: 0 x NaN is NaN, in gradients too.
        x = select_real(x, segments)
        more = (values, None) if self.keeps_segments else (values,)
        if state is None:
            ends = segments is not None and segments.padding == "end" and not segments.packed
            plain = ends and segments.intervals is None and segments.gates is None
            if self.causal and plain and not self.reads_lengths:
                # Padding behind a row's only segment comes after all of its tokens, which do not see it.
                y, _, values = self._mix(x, None, None, *more)
                return select_real(y, segments), None, values
            y, _, values = self._mix(x, None, segments, *more)
            return y, None, values
        self._require_causal("a state was given")
        if segments is not None and segments.gates is not None:
            raise ValueError(f"{type(self).__name__} was given gates and a state; expected whole sequences")
        self._check_state(state, x.shape[0])
        here = visit(state.place, segments, x.shape[1])
        carried = state.carried
        if self.keeps_segments:
            more = (values, here)
        elif segments is not None:
            carried = keep_where(here.continues, carried, self.initial(x.shape[0], None))
        y, carried, values = self._mix(x, carried, segments, *more)
        return y, MixerState(carried, here.place), values

    def source(self, y: Float[Array, "b s d"], *, segment_ids: SegmentIds = None) -> Source:
        """Returns what `cross` reads of a source.

        Args:
          y: outputs of an encoder (b, s, d).
          segment_ids: (b, s), as for `__call__`.

        Raises:
          ValueError, TypeError: as for `__call__`, or the mixer has no cross-attention.
        """
        if "noncausal_cross" not in self.patterns:
            raise ValueError(
                f"{type(self).__name__} reads no source; mixers with a pattern 'noncausal_cross' do, such as 'attention'"
            )
        self._check(y, segment_ids)
        segments = Segments.of(segment_ids)
        numbers = jnp.ones(y.shape[:2], jnp.int32) if segments is None else segments.numbers
        entries = self._run(self.entries_of, select_real(y, segments), segments)
        return Source(entries, numbers, None if segments is None else segments.gates)

    def cross(
        self, x: Float[Array, "b t d"], source: Source, *, numbers: Int[Array, "b t"] | None = None
    ) -> Float[Array, "b t d"]:
        """Returns what the tokens x of a target read of a source; no token of x reads another.

        Args:
          x: tokens of the target (b, t, d), any t.
          source: what `source` returns, for as many rows.
          numbers: the segments of x in their rows, counted from 1; 0 is padding. None for one segment per row.

        Raises:
          ValueError: x does not fit the mixer, or the source has other rows.
        """
        self._check(x, numbers)
        if source.numbers.shape[0] != x.shape[0]:
            raise ValueError(
                f"source of {type(self).__name__} has {source.numbers.shape[0]} rows, and x has {x.shape[0]}; expected one source per row"
            )
        numbers = jnp.ones(x.shape[:2], jnp.int32) if numbers is None else numbers
        x = jnp.where(numbers[..., None] == 0, 0, x)
        return jnp.where(numbers[..., None] == 0, 0, self._run(self.read, x, source, numbers))

    def alone(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Returns outputs along time of the mixer without its model: x stands for values of an earlier layer that it reads."""
        return self.sharing(x, None, x if self.takes_values else None)[0]

    def _mix(self, x: jax.Array, carried: Any, segments: Any, values: Any, *rest: Any) -> tuple[Any, ...]:
        """Returns outputs, what to carry and shared values; explains what fails for sizes that are symbols of `jax.export`."""
        if self.shares_values:
            return self._run(self.mix_sharing, x, carried, segments, values)
        mix = isolated_tokens(self.mix) if self.isolates_tokens and self.causal else self.mix
        return *self._run(mix, x, carried, segments, *rest), values

    def _run(self, mix: Callable[..., Any], x: jax.Array, *rest: Any) -> Any:
        if jnp.dtype(self.config.dtype) != jnp.float32:
            mix = promoting(mix)  # activations meet parameters and states in float32
        if all(isinstance(size, int) for size in x.shape):
            return mix(x, *rest)
        try:
            return mix(x, *rest)
        except Exception as error:
            name, (batch, time, _) = type(self).__name__, x.shape
            raise ValueError(
                f"x of {name} has shape {x.shape}, and its computation depends on the numbers behind symbols; export {name} "
                f"with a number in place of {time if not isinstance(time, int) else batch}"
            ) from error

    def _check(self, x: jax.Array, segment_ids: Any) -> None:
        name, width = type(self).__name__, self.config.width
        if x.ndim != 3 or x.shape[-1] != width:
            raise ValueError(f"x of {name} has shape {x.shape}; expected (b, t, {width})")
        if segment_ids is None:
            return
        if segment_ids.shape != x.shape[:2]:
            raise ValueError(f"segment_ids of {name} has shape {segment_ids.shape}; expected {x.shape[:2]}")
        ids = segment_ids.ids if isinstance(segment_ids, Segments) else segment_ids
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise TypeError(f"segment_ids of {name} has dtype {ids.dtype}; expected an integer type")
        if isinstance(segment_ids, Segments) and segment_ids.gates is not None and not self.takes_gates:
            raise ValueError(f"{name} adds no gates to the logits of its keys here; expected 'attention'")
        if (
            isinstance(segment_ids, Segments)
            and segment_ids.intervals is not None
            and not self.takes_intervals
        ):
            raise ValueError(
                f"{name} takes no intervals between tokens here; S5 and S4D with bidirectional=False do"
            )

    def _require_causal(self, what: str) -> None:
        if not self.causal:
            raise ValueError(
                f"{type(self).__name__} is not causal here and has no state, but {what}; "
                "call it with state=None on the whole sequence"
            )

    def _expected(self, carried: Any, batch_size: int) -> Any:
        """Returns the shapes of what is carried for as many rows, with the max_length that `carried` was made with."""

        def shapes(length):
            return jax.eval_shape(lambda: self.initial(batch_size, length))

        if isinstance(carried, CacheState):  # a policy's, in place of a cache
            if not getattr(self, "takes_cache_policy", False):
                return shapes(1)
            return jax.eval_shape(lambda: carried.like(self.initial(batch_size, carried.slots)))
        short, longer = shapes(1), shapes(2)
        if jax.tree.structure(carried) != jax.tree.structure(short):
            return short
        # The first axis that grows with max_length tells which one the state was made with.
        lengths = [
            1 + (got - first) // (second - first)
            for leaf, small, large in zip(*map(jax.tree.leaves, (carried, short, longer)), strict=True)
            for got, first, second in zip(jnp.shape(leaf), small.shape, large.shape)
            if first != second
        ]
        return shapes(max(1, lengths[0]) if lengths else 1)

    def _check_state(self, state: Any, batch_size: int) -> None:
        """Raises unless the state is one that `init_state` makes for `batch_size` rows, whatever its max_length."""
        name = type(self).__name__
        if not isinstance(state, MixerState):
            raise TypeError(f"state of {name} is a {type(state).__name__}; expected what init_state returns")
        check_place(name, state.place, batch_size)
        expected = self._expected(state.carried, batch_size)
        if jax.tree.structure(state.carried) != jax.tree.structure(expected):
            raise ValueError(
                f"state of {name} is that of another mixer; expected what its init_state returns"
            )
        for (path, leaf), want in zip(
            jax.tree.leaves_with_path(state.carried), jax.tree.leaves(expected), strict=True
        ):
            _check_leaf(f"state{jax.tree_util.keystr(path)} of {name}", leaf, want, batch_size)


def check_place(name: str, place: Any, batch_size: int) -> None:
    """Raises unless `place` is that of `batch_size` rows; `name` is what carries it."""
    if not isinstance(place, Place):
        raise TypeError(
            f"place in the state of {name} is a {type(place).__name__}; expected what init_state returns"
        )
    for field, leaf, want in zip(Place._fields, place, initial_place(batch_size), strict=True):
        _check_leaf(f"state.place.{field} of {name}", leaf, want, batch_size)


def _check_leaf(name: str, leaf: Any, want: Any, batch_size: int) -> None:
    if jnp.shape(leaf) != want.shape:
        raise ValueError(
            f"{name} has shape {jnp.shape(leaf)}; expected {want.shape} for x of {batch_size} rows, "
            f"as init_state({batch_size}) makes it"
        )
    kinds = (jnp.complexfloating, jnp.floating, jnp.integer, jnp.bool_)
    kind = next(kind for kind in kinds if jnp.issubdtype(want.dtype, kind))
    if not jnp.issubdtype(jnp.result_type(leaf), kind):
        raise TypeError(f"{name} has dtype {jnp.result_type(leaf)}; expected {want.dtype}")


__all__ = ["EVERY", "SELF", "Mixer", "MixerState", "Source", "Visit", "check_place"]
