"""Choice of an implementation: `impl=None` takes the best that accepts the call, a name takes that one or says why not."""

import contextlib
import contextvars
import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_preferred: contextvars.ContextVar[Mapping[str, str] | None] = contextvars.ContextVar(
    "preferred", default=None
)
_taken: contextvars.ContextVar[list[tuple[str, str]] | None] = contextvars.ContextVar("taken", default=None)


def _accepts_everything(**_: Any) -> str | None:
    return None


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One implementation of a primitive.

    Attributes:
      run: the function; takes the arguments of the primitive, already checked.
      refuses: given the same arguments, the reason why `run` cannot take them, or None.
      automatic: whether `impl=None` may choose it; given the same arguments.
    """

    run: Callable[..., Any]
    refuses: Callable[..., str | None] = _accepts_everything
    automatic: Callable[..., bool] = lambda **_: True


@contextlib.contextmanager
def noted() -> Iterator[list[tuple[str, str]]]:
    """Gives a list that gets (primitive, implementation) of every call that is dispatched inside."""
    taken: list[tuple[str, str]] = []
    token = _taken.set(taken)
    try:
        yield taken
    finally:
        _taken.reset(token)


@contextlib.contextmanager
def preferred(choices: Mapping[str, str]) -> Iterator[None]:
    """Calls with `impl=None` that are traced inside take these implementations, by primitive, wherever they do not refuse."""
    token = _preferred.set(choices)
    try:
        yield
    finally:
        _preferred.reset(token)


def dispatch(
    primitive: str, implementations: Mapping[str, Implementation], impl: str | None, **arguments: Any
) -> Any:
    """Runs the first implementation that is automatic and does not refuse, or the one named `impl`; see also `preferred`.

    Raises:
      ValueError: `impl` is not a known name, or the named implementation cannot take these arguments.
    """
    if impl is None:
        if (wanted := (_preferred.get() or {}).get(primitive)) is not None:
            candidate = _named(primitive, implementations, wanted)
            if candidate.refuses(**arguments) is None:
                return _run(primitive, wanted, candidate, arguments)
        for name, candidate in implementations.items():
            if candidate.automatic(**arguments) and candidate.refuses(**arguments) is None:
                return _run(primitive, name, candidate, arguments)
        impl = "reference"
    candidate = _named(primitive, implementations, impl)
    reason = candidate.refuses(**arguments)
    if reason is not None:
        raise ValueError(f"impl={impl!r} of {primitive} cannot take this call: {reason}")
    return _run(primitive, impl, candidate, arguments)


def _named(primitive: str, implementations: Mapping[str, Implementation], impl: str) -> Implementation:
    if impl not in implementations:
        close = difflib.get_close_matches(impl, implementations, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"impl={impl!r} is not an implementation of {primitive}: {sorted(implementations)}{hint}"
        )
    return implementations[impl]


def _run(primitive: str, name: str, implementation: Implementation, arguments: Mapping[str, Any]) -> Any:
    if (taken := _taken.get()) is not None:
        taken.append((primitive, name))
    return implementation.run(**arguments)
