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
from layers.kernels.forward_mode import reverse_mode_only
from layers.kernels.partition import Mendable
from layers.kernels.promotion import promoting
from layers.kernels.sizes import known

_logger = logging.getLogger(__name__)
_preferred: contextvars.ContextVar[Mapping[str, str] | None] = contextvars.ContextVar(
    "preferred", default=None
)
_taken: contextvars.ContextVar[list[tuple[str, str]] | None] = contextvars.ContextVar("taken", default=None)
_over_time: contextvars.ContextVar[list[tuple[str, bool]] | None] = contextvars.ContextVar(
    "over_time", default=None
)
_choices: contextvars.ContextVar["list[Choice] | None"] = contextvars.ContextVar("choices", default=None)


_NO_FORWARD_MODE = (
    "impl={name!r} of {primitive} has a backward pass of its own and no forward-mode differentiation (jax.jvp, jax.jacfwd); "
    "use impl='reference', or reverse mode (jax.grad, jax.vjp, jax.jacrev)"
)


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
    """

    run: Callable[..., Any]
    unsupported_reason: Callable[..., str | None] = _no_reason
    passed_over_reason: Callable[..., str | None] = _no_reason
    backend: devices.Backend | None = None
    forward_mode: bool = False

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
def preferred(choices: Mapping[str, str]) -> Iterator[None]:
    """Context in which calls with `impl=None` take these implementations, by primitive, wherever they are supported."""
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
            return over_time(functools.partial(dispatch, primitive, implementations, impl), impl, arguments)
    if impl is not None:
        candidate = _named(primitive, implementations, impl)
        if (reason := candidate.refusal(arguments)) is not None:
            raise ValueError(f"impl={impl!r} of {primitive} cannot take this call: {reason}")
    if any(getattr(x, "size", 1) == 0 for name, x in arguments.items() if name != "initial_state"):
        return _run(primitive, "reference", implementations["reference"], arguments)
    if impl is not None:
        return _run(primitive, impl, candidate, arguments)
    passed_over: dict[str, str] = {}
    wanted = (_preferred.get() or {}).get(primitive)
    if wanted is not None:
        candidate = _named(primitive, implementations, wanted)
        if (reason := candidate.refusal(arguments)) is None:
            return _run(primitive, wanted, candidate, arguments)
        _pass_over(primitive, wanted, candidate, reason, passed_over)
    for name, candidate in implementations.items():
        reason = candidate.refusal_by_default(arguments)
        if reason is None:
            return _run(primitive, name, candidate, arguments, passed_over)
        _pass_over(primitive, name, candidate, reason, passed_over)
    return _run(primitive, "reference", implementations["reference"], arguments, passed_over)


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
    arguments: Mapping[str, Any],
    passed_over: Mapping[str, str] | None = None,
) -> Any:
    if (taken := _taken.get()) is not None:
        taken.append((primitive, name))
    if (choices := _choices.get()) is not None:
        skipped = tuple((other, why) for other, why in (passed_over or {}).items() if other != name)
        choices.append(Choice(primitive, _summary(arguments), name, skipped))
    if not implementation.forward_mode:
        arguments = reverse_mode_only(arguments, _NO_FORWARD_MODE.format(primitive=primitive, name=name))
    return promoting(implementation.run)(**arguments)


def _summary(arguments: Mapping[str, Any]) -> str:
    def shown(name, leaf):
        return f"{name}: {leaf.dtype}[{','.join(map(str, leaf.shape))}]"

    leaves = {name: jax.tree.leaves(value)[:1] for name, value in arguments.items()}
    return ", ".join(
        shown(name, found[0]) for name, found in leaves.items() if found and hasattr(found[0], "shape")
    )
