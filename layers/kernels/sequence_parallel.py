"""Primitives on a mesh that divides time: each device runs its part of the tokens, and states cross the cuts.

On a mesh with automatic axes that divides over `sequence`, device p of P holds the tokens p t / P to (p + 1) t / P. What a
primitive does with them is its form over time. A recurrence is affine in its state, so that consecutive tokens are a
piece (T, U): S -> T S + U. Every device summarises its tokens, all devices gather the P pieces, and

    S_p = T_{p-1} S_{p-1} + U_{p-1}

gives the state before each part, from which the device runs its own tokens: LASP-2 (Sun et al. 2025, arXiv:2502.07563), with
decays and transitions. The bytes that are gathered do not depend on t. Or states flow from device to device in blocks
(`all_scan`), which moves less where there are many devices. A device reads its tokens twice, once for the piece and once for
the outputs, runs both at once where outputs are linear in the state, or has kernels whose passes carry the states over the
cuts themselves.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from layers.kernels import kept, partition
from layers.kernels.all_scan import all_scan
from layers.kernels.partition import SEQUENCE_AXIS
from layers.kernels.promotion import joint_dtype
from layers.kernels.segments import Segments, reset_mask
from layers.kernels.shard_map_types import vary_alike, vary_as
from layers.kernels.sizes import known

Arguments = Mapping[str, Any]
AttentionMethod = Literal[
    "all_gather", "ulysses", "ring", "zigzag", "balanced_ring", "token_ring", "score_ring", "partitioned"
]
StateMethod = Literal["all_gather", "all_scan"]
_method: contextvars.ContextVar[AttentionMethod] = contextvars.ContextVar("method", default="all_gather")
_states: contextvars.ContextVar[StateMethod] = contextvars.ContextVar("states", default="all_gather")


def attention_by(method: AttentionMethod) -> contextlib.AbstractContextManager[None]:
    """Context in which attention over divided time is traced by this method (see `layers.kernels.attention.over_time`)."""
    return _within(_method, "method", method, AttentionMethod)


def states_by(method: StateMethod) -> contextlib.AbstractContextManager[None]:
    """Context in which states cross the cuts of divided time by this method: gathered, or from device to device."""
    return _within(_states, "states", method, StateMethod)


@contextlib.contextmanager
def _within(variable: contextvars.ContextVar, name: str, method: str, methods: Any) -> Iterator[None]:
    if method not in get_args(methods):
        *names, last = map(repr, get_args(methods))
        raise ValueError(f"{name}={method!r}; expected {', '.join(names)} or {last}")
    token = variable.set(method)
    try:
        yield
    finally:
        variable.reset(token)


def attention_method() -> AttentionMethod:
    """Returns the method in force."""
    return _method.get()


class Cut(NamedTuple):
    """What segments say of the cut in time before the tokens of a device; None of rows that are whole.

    Attributes:
      begins: (b,), whether these tokens begin another segment.
      resets: (b,), whether one begins among them.
    """

    begins: jax.Array | None = None
    resets: jax.Array | None = None

    @classmethod
    def of(cls, part: Segments | None, begins: jax.Array | None) -> "Cut":
        """The cut of what `part_of_segments` returns."""
        return cls() if begins is None else cls(begins, part.starts.any(1))

    @property
    def forgets(self) -> jax.Array | None:
        """(b,), whether no state from before these tokens reaches their end."""
        return None if self.begins is None else self.begins | self.resets

    @property
    def backward(self) -> "Cut":
        """The cut after these tokens, as gradients of states cross it."""
        if self.begins is None:
            return self
        pairs = [(i + 1, i) for i in range(jax.lax.axis_size(SEQUENCE_AXIS) - 1)]
        return self._replace(begins=jax.lax.ppermute(self.begins, SEQUENCE_AXIS, pairs))


@dataclasses.dataclass(frozen=True)
class Crossing:
    """How states cross the cuts of divided time.

    Attributes:
      compose, elementwise: as in `Recurrence`.
      method: what devices send.
    """

    compose: Callable[[Any, Any], Any]
    elementwise: bool = False
    method: StateMethod = "all_gather"

    def before(self, piece: Any, cut: Cut, initial: jax.Array | None, reverse: bool = False) -> jax.Array:
        """Returns the state before this device's tokens.

        Args:
          piece: the effect of this device's tokens, a NamedTuple with the transition and the state.
          cut: the cut before them.
          initial: the state before all tokens, zero if None.
          reverse: whether the last device's tokens are run first.
        """
        if self.method == "all_gather":
            return across(piece, self.compose, cut, initial, reverse)[0]
        piece, state = _entering(piece, cut, initial)
        own = all_scan(piece, self.compose, state, cut.forgets, elementwise=self.elementwise, reverse=reverse)
        return own if cut.begins is None else _where(cut.begins, 0, own)


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """The form over time of a primitive with a state.

    Attributes:
      axes: letters of the axes of each array argument, such as "b t h k", by name; several patterns are told apart by their
        number of axes. b, t and h are divided like rows, time and heads (or channels). An axis of size 1 in place of them
        stands for all.
      outputs: the letters of the outputs.
      state: the letters of the state.
      compose: the composition of two pieces.
      elementwise: whether transitions multiply states number by number. Otherwise they leave the last axis of a state alone.
      summarize: (arguments, segments, impl) -> the piece of these tokens, a NamedTuple with the transition and the state.
      at_once: (run, arguments, segments) -> the piece, and a function of the state before these tokens to the outputs; in place
        of `summarize` where one run gives both.
    """

    axes: Mapping[str, tuple[str, ...]]
    outputs: str
    state: str
    compose: Callable[[Any, Any], Any]
    elementwise: bool = False
    summarize: Callable[[Arguments, Segments | None, str | None], Any] | None = None
    at_once: Callable[[Callable[..., Any], Arguments, Segments | None], tuple[Any, Callable]] | None = None

    def takes(self, arguments: Arguments) -> bool:
        """Returns whether the mesh in force divides the time of these arguments."""
        return parts_of_time(_length(self.axes, arguments)) > 1

    def __call__(self, run: Callable[..., Any], impl: str | None, arguments: Arguments) -> Any:
        """Returns what the primitive returns for whole arrays; `run` takes the arguments of one device."""
        arguments = dict(arguments)
        segments, reverse = arguments.pop("segments"), arguments.get("reverse", False)
        given = {name: arguments.pop(name) for name in self.axes if arguments.get(name) is not None}
        entries = entries_of(self.axes, given)
        rows = P(entries["b"], entries["t"])
        crossing = Crossing(self.compose, self.elementwise, _states.get())

        def local(given, tokens):
            given, tokens = vary_alike((given, tokens))
            part, begins = part_of_segments(segments, tokens, reverse)
            everything = dict.fromkeys(self.axes) | arguments | given
            initial, cut = given.get("initial_state"), Cut.of(part, begins)
            if (
                results := run.across(everything | {"segments": part}, crossing=crossing, cut=cut)
            ) is not None:
                out, final = results
                return out, of_last(final, reverse)
            if self.at_once is not None:
                piece, outputs = self.at_once(run, everything, part)
                own = crossing.before(piece, cut, initial, reverse)
                carried = own if part is None else _where(part.starts.any(1), 0, own)
                final = self.compose(piece._replace(state=carried), piece).state
                return outputs(own), of_last(final, reverse)
            piece = self.summarize(everything, part, impl)
            own = crossing.before(piece, cut, initial, reverse)
            out, final = run(**everything | {"initial_state": own}, segments=part)
            return out, of_last(final, reverse)

        specs = {name: spec_of(self.axes, name, x, entries) for name, x in given.items()}
        tokens = tokens_of(segments, reverse)
        results = spec(self.outputs, entries), spec(self.state, entries)
        return partition.over_shards(local, (given, tokens), (specs, rows), results)


def parts_of_time(length: int | None) -> int:
    """The number of devices that time of this length is divided over on the mesh in force; 1 if it is not divided."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or length is None or SEQUENCE_AXIS not in mesh.axis_names:
        return 1
    size = mesh.shape[SEQUENCE_AXIS]
    kind = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))[SEQUENCE_AXIS]
    return size if kind == AxisType.Auto and known(length) and length and length % size == 0 else 1


def entries_of(axes: Mapping[str, tuple[str, ...]], given: Arguments) -> dict[str, Any]:
    """The mesh axes of rows, time and heads, by letter; None where they do not divide every array."""
    mesh = jax.sharding.get_abstract_mesh()

    def dividing(letter, names):
        sizes = {size for name, x in given.items() for size in _sizes(axes[name], x, letter)} - {1}
        chosen: list[str] = []
        for name in names:
            parts = mesh.shape.get(name, 1)
            if parts > 1 and sizes and all(size % parts == 0 for size in sizes):
                chosen.append(name)
                sizes = {size // parts for size in sizes}
        return tuple(chosen) or None

    return {
        "b": dividing("b", partition.BATCH_AXES),
        "h": dividing("h", partition.HEAD_AXES),
        "t": SEQUENCE_AXIS,
    }


def spec(letters: str, entries: Mapping[str, Any]) -> P:
    """How an array with these axes is divided."""
    return P(*(entries.get(letter) for letter in letters.split()))


def spec_of(axes: Mapping[str, tuple[str, ...]], name: str, x: jax.Array, entries: Mapping[str, Any]) -> P:
    """How an argument is divided; an axis of size 1 stands for all and is whole."""
    letters = _letters(axes[name], x)
    return P(*(entries.get(a) if size > 1 else None for a, size in zip(letters, x.shape, strict=True)))


def tokens_of(segments: Segments | None, reverse: bool = False) -> Any:
    """What `part_of_segments` needs of the segments, cut along time: ids, and the resets of whole rows if there are any."""
    if segments is None:
        return None
    return segments.ids, reset_mask(segments, reverse)


def part_of_segments(
    segments: Segments | None, tokens: Any, reverse: bool = False
) -> tuple[Segments | None, jax.Array | None]:
    """The segments of this device's tokens, as a row of their own, and whether (b) they begin another segment.

    Args:
      segments: the segments of whole rows, for what is static.
      tokens: this device's part of `tokens_of`.
    """
    if segments is None:
        return None, None
    ids, resets = tokens
    part = Segments.of(ids, padding=segments.padding, packed=segments.packed)
    if resets is None:
        return part, None
    # In its own row the first token of a part resets nothing.
    return part, (resets & ~reset_mask(part, reverse)).any(1)


def across(
    piece: Any,
    compose: Callable[[Any, Any], Any],
    cut: Cut,
    initial: jax.Array | None,
    reverse: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns the state before this device's tokens and the one after those of all devices.

    Args:
      piece: the effect of this device's tokens, (transition, state).
      compose: the composition of two pieces.
      cut: the cut before them.
      initial: the state before all tokens, zero if None.
      reverse: whether the last device's tokens are run first.
    """
    piece, state = _entering(piece, cut, initial)
    pieces, every = kept.named(jax.lax.all_gather((piece, cut.forgets), SEQUENCE_AXIS))
    index, count = jax.lax.axis_index(SEQUENCE_AXIS), jax.lax.axis_size(SEQUENCE_AXIS)
    if reverse:
        index = count - 1 - index

    def step(carry, inputs):
        state, own = carry
        number, one, forget = inputs
        own = jnp.where(number == index, state, own)
        before = state if forget is None else _where(forget, 0, state)
        return (compose(one._replace(state=before), one).state, own), None

    state = vary_as(state, *jax.tree.leaves((pieces, every, index)))
    if reverse:
        pieces, every = jax.tree.map(lambda v: v[::-1], (pieces, every))
    inputs = jnp.arange(count), pieces, every
    (state, own), _ = jax.lax.scan(step, (state, jnp.zeros_like(state)), inputs)
    return own if cut.begins is None else _where(cut.begins, 0, own), state


def _entering(piece, cut, initial):
    """The piece without what its tokens forget, and the state before all tokens."""
    state = jnp.zeros_like(piece.state) if initial is None else initial
    state = state.astype(joint_dtype(state.dtype, piece.state.dtype))
    if cut.forgets is None:
        return piece, state
    # A choice, not a product: what is forgotten may not be finite.
    return type(piece)(_where(cut.forgets, 0, piece[0]), piece.state), state


def of_last(x: jax.Array, reverse: bool = False) -> jax.Array:
    """Returns what the device with the last tokens holds (the first, if `reverse`) on every device."""
    index = jax.lax.axis_index(SEQUENCE_AXIS)
    last = 0 if reverse else jax.lax.axis_size(SEQUENCE_AXIS) - 1
    return jax.lax.psum(jnp.where(index == last, x, 0), SEQUENCE_AXIS)


def of_first(x: jax.Array) -> jax.Array:
    """Returns what the device with the first tokens holds there, and zeros elsewhere."""
    return jnp.where(jax.lax.axis_index(SEQUENCE_AXIS) == 0, x, 0)


def _where(flags, value, x):
    return jnp.where(flags.reshape(*flags.shape, *[1] * (x.ndim - flags.ndim)), value, x)


def _letters(patterns, x):
    return next(letters for letters in map(str.split, patterns) if len(letters) == x.ndim)


def _sizes(patterns, x, letter):
    return [size for name, size in zip(_letters(patterns, x), x.shape, strict=True) if name == letter]


def _length(axes, arguments):
    given = {name: arguments[name] for name in axes if arguments.get(name) is not None}
    sizes = {size for name, x in given.items() for size in _sizes(axes[name], x, "t")}
    # Symbols, as `jax.export` has them, are equal or not, but have no order.
    return next(iter(sizes - {1}), None)
