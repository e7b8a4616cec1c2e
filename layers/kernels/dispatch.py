"""Choice of an implementation: `impl=None` takes the fastest that accepts the call; a name takes that one or raises."""

import contextlib
import contextvars
import dataclasses
import difflib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from layers.kernels import devices
from layers.kernels.forward_mode import REFERENCE, no_forward_mode, reverse_mode_only
from layers.kernels.partition import Mendable
from layers.kernels.promotion import promoting
from layers.kernels.sizes import known

_logger = logging.getLogger(__name__)
_preferred: contextvars.ContextVar[Mapping[str, str] | str | None] = contextvars.ContextVar(
    "preferred", default=None
)
_taken: contextvars.ContextVar[list[tuple[str, str]] | None] = contextvars.ContextVar("taken", default=None)
_over_time: contextvars.ContextVar[list[tuple[str, bool]] | None] = contextvars.ContextVar(
    "over_time", default=None
)
_choices: contextvars.ContextVar["list[Choice] | None"] = contextvars.ContextVar("choices", default=None)


def _no_reason(**_: Any) -> str | None:
    return None


def by_name_only(**_: Any) -> str | None:
    """The `passed_over_reason` of an implementation that is only chosen by name."""
    return "it is taken by name only"


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One implementation of a primitive.

    Attributes:
      run: the function; takes the arguments of the primitive, already checked.
      unsupported_reason: given the same arguments, why `run` cannot take them, or None.
      passed_over_reason: given the same arguments, why `impl=None` does not choose it for a supported call, or None.
      backend: the only kind of device that runs it, or None for all.
      forward_mode: whether `jax.jvp` goes through; if not, it raises a TypeError that says what works.
      across: `run` for one of the devices that divide time, if its passes carry states over the cuts themselves. It takes
        `crossing` and `cut` too (see `sequence_parallel`), and returns the state after the tokens of this device, or None in
        place of all results for calls whose passes do not.
    """

    run: Callable[..., Any]
    unsupported_reason: Callable[..., str | None] = _no_reason
    passed_over_reason: Callable[..., str | None] = _no_reason
    backend: devices.Backend | None = None
    forward_mode: bool = False
    across: Callable[..., Any] | None = None

    def symbols(self, arguments: Mapping[str, Any]) -> str | None:
        """Why kernels for one device cannot take sizes that `jax.export` gives as symbols, or None."""
        for name, x in arguments.items() if self.backend is not None else ():
            if not all(map(known, getattr(x, "shape", ()))):
                return f"{name} has shape {x.shape}; its kernels need numbers: export with impl='xla'"
        return None

    def refusal(self, arguments: Mapping[str, Any]) -> str | None:
        """Why `run` cannot take these arguments, or None."""
        return self.symbols(arguments) or self.unsupported_reason(**arguments)

    def refusal_by_default(self, arguments: Mapping[str, Any]) -> str | None:
        """Why `impl=None` does not choose this implementation, or None."""
        return (
            self.symbols(arguments)
            or self.passed_over_reason(**arguments)
            or self.unsupported_reason(**arguments)
        )


class Choice(NamedTuple):
    """How one call was dispatched.

    Attributes:
      primitive: name of the primitive.
      arguments: types and shapes of its arrays, such as "x: float32[8,64,256]".
      implementation: name of the implementation that runs.
      passed_over: the implementations before it in order of preference, each with the reason why it is not chosen.
    """

    primitive: str
    arguments: str
    implementation: str
    passed_over: tuple[tuple[str, str], ...]


@contextlib.contextmanager
def noted() -> Iterator[list[tuple[str, str]]]:
    """Context that gives a list of (primitive, implementation), one entry per call dispatched inside."""
    with _collected(_taken) as taken:
        yield taken


def note(primitive: str, implementation: str) -> None:
    """Adds an entry to the lists that `noted` gives."""
    if (taken := _taken.get()) is not None:
        taken.append((primitive, implementation))


@contextlib.contextmanager
def over_time_noted() -> Iterator[list[tuple[str, bool]]]:
    """Context that gives a list of (primitive, whether each device runs its part of time), one entry per call inside.

    Primitives that have no form over time because they read no tokens are left out.
    """
    with _collected(_over_time) as found:
        yield found


@contextlib.contextmanager
def explained() -> Iterator[list[Choice]]:
    """Context that gives a list with the `Choice` of every call dispatched inside, and logs none of their reasons."""
    with _collected(_choices) as choices:
        yield choices


@contextlib.contextmanager
def _collected(variable: contextvars.ContextVar) -> Iterator[list[Any]]:
    collected: list[Any] = []
    token = variable.set(collected)
    try:
        yield collected
    finally:
        variable.reset(token)


@contextlib.contextmanager
def preferred(choices: Mapping[str, str] | str) -> Iterator[None]:
    """Context in which calls with `impl=None` take these implementations wherever they are supported.

    Args:
      choices: implementations by primitive; or "reference", for all of them, through which forward-mode differentiation of
        any layer goes.
    """
    token = _preferred.set(choices)
    try:
        yield
    finally:
        _preferred.reset(token)


@runtime_checkable
class OverTime(Protocol):
    """How a primitive runs on devices that each hold a part of the tokens; see `sequence_parallel`."""

    def takes(self, arguments: Mapping[str, Any]) -> bool:
        """Returns whether the mesh in force divides the time of these arguments."""

    def __call__(self, run: Callable[..., Any], impl: str | None, arguments: Mapping[str, Any]) -> Any:
        """Returns the results for whole arrays; `run` takes the arguments of one device."""


def dispatch(
    primitive: str,
    implementations: Mapping[str, Implementation],
    impl: str | None,
    *,
    over_time: OverTime | None = None,
    **arguments: Any,
) -> Any:
    """Runs the first implementation without a reason against it, or the one named `impl`; see also `preferred`.

    Where the mesh divides time and the primitive has a form for that, `over_time`, each device dispatches its own part.

    The reference serves calls with an empty array, which cost nothing and which blocks do not divide. An implementation
    for the current device that is passed over is logged, once per reason.

    Raises:
      ValueError: `impl` is not a known name, or the named implementation cannot take these arguments.
    """
    divided = over_time is not None and over_time.takes(arguments)
    if over_time is not None and (noted := _over_time.get()) is not None:
        noted.append((primitive, divided))
    if divided:
        if impl is not None:
            _named(primitive, implementations, impl)
        with _collected(_over_time):  # what a device does with its part is its own
            return over_time(Local(primitive, implementations, impl), impl, arguments)
    return _run(primitive, *_chosen(primitive, implementations, impl, arguments), arguments)


class Local(NamedTuple):
    """A primitive on the tokens of one device of those that divide time; called like `dispatch`, with the arguments alone."""

    primitive: str
    implementations: Mapping[str, Implementation]
    impl: str | None

    def __call__(self, **arguments: Any) -> Any:
        return dispatch(*self, **arguments)

    def across(self, arguments: Mapping[str, Any], **cut: Any) -> Any | None:
        """Returns what `Implementation.across` of the implementation that is taken does; None if it has no such form."""
        name, chosen, passed_over = _chosen(*self, arguments)
        if chosen.across is None:
            return None
        chosen = dataclasses.replace(chosen, run=functools.partial(chosen.across, **cut))
        return _run(self.primitive, name, chosen, passed_over, arguments)


def _chosen(
    primitive: str,
    implementations: Mapping[str, Implementation],
    impl: str | None,
    arguments: Mapping[str, Any],
) -> tuple[str, Implementation, Mapping[str, str]]:
    """The name of the implementation that runs, itself, and the reasons against those before it."""
    if impl is not None:
        candidate = _named(primitive, implementations, impl)
        if (reason := candidate.refusal(arguments)) is not None:
            raise ValueError(f"impl={impl!r} of {primitive} cannot take this call: {reason}")
    if any(getattr(x, "size", 1) == 0 for name, x in arguments.items() if name != "initial_state"):
        return "reference", implementations["reference"], {}
    if impl is not None:
        return impl, candidate, {}
    passed_over: dict[str, str] = {}
    choices = _preferred.get() or {}
    wanted = choices if isinstance(choices, str) else choices.get(primitive)
    if wanted is not None:
        candidate = _named(primitive, implementations, wanted)
        if (reason := candidate.refusal(arguments)) is None:
            return wanted, candidate, {}
        _pass_over(primitive, wanted, candidate, reason, passed_over)
    for name, candidate in implementations.items():
        reason = candidate.refusal_by_default(arguments)
        if reason is None:
            return name, candidate, passed_over
        _pass_over(primitive, name, candidate, reason, passed_over)
    return "reference", implementations["reference"], passed_over


def _named(primitive: str, implementations: Mapping[str, Implementation], impl: str) -> Implementation:
    if impl not in implementations:
        close = difflib.get_close_matches(impl, implementations, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"impl={impl!r} is not an implementation of {primitive}: {sorted(implementations)}{hint}"
        )
    return implementations[impl]


def _pass_over(
    primitive: str, name: str, candidate: Implementation, reason: str, passed_over: dict[str, str]
) -> None:
    passed_over[name] = reason
    if _choices.get() is None and candidate.backend is not None and candidate.backend == devices.backend():
        log_once(primitive, name, reason, isinstance(reason, Mendable))


@functools.cache
def log_once(primitive: str, name: str, reason: str, mendable: bool) -> None:
    """Logs why an implementation is passed over; a warning if the caller can change that."""
    level = logging.WARNING if mendable else logging.INFO
    _logger.log(level, "%s does not take %r: %s", primitive, name, reason)


def _run(
    primitive: str,
    name: str,
    implementation: Implementation,
    passed_over: Mapping[str, str],
    arguments: Mapping[str, Any],
) -> Any:
    note(primitive, name)
    if (choices := _choices.get()) is not None:
        skipped = tuple((other, why) for other, why in passed_over.items() if other != name)
        choices.append(Choice(primitive, _summary(arguments), name, skipped))
    if not implementation.forward_mode:
        message = no_forward_mode(f"impl={name!r} of {primitive}", REFERENCE)
        arguments = reverse_mode_only(arguments, message)
    return promoting(implementation.run)(**arguments)


def _summary(arguments: Mapping[str, Any]) -> str:
    def shown(name, leaf):
        return f"{name}: {leaf.dtype}[{','.join(map(str, leaf.shape))}]"

    leaves = {name: jax.tree.leaves(value)[:1] for name, value in arguments.items()}
    return ", ".join(
        shown(name, found[0]) for name, found in leaves.items() if found and hasattr(found[0], "shape")
    )
