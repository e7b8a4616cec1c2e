"""Choice of an implementation: `impl=None` takes the best that accepts the call, a name takes that one or says why not."""

import contextlib
import contextvars
import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

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


def dispatch(
    primitive: str, implementations: Mapping[str, Implementation], impl: str | None, **arguments: Any
) -> Any:
    """Runs the first implementation that is automatic and does not refuse, or the one named `impl`.

    Raises:
      ValueError: `impl` is not a known name, or the named implementation cannot take these arguments.
    """
    if impl is None:
        for name, candidate in implementations.items():
            if candidate.automatic(**arguments) and candidate.refuses(**arguments) is None:
                return _run(primitive, name, candidate, arguments)
        impl = "reference"
    if impl not in implementations:
        close = difflib.get_close_matches(impl, implementations, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"impl={impl!r} is not an implementation of {primitive}: {sorted(implementations)}{hint}"
        )
    reason = implementations[impl].refuses(**arguments)
    if reason is not None:
        raise ValueError(f"impl={impl!r} of {primitive} cannot take this call: {reason}")
    return _run(primitive, impl, implementations[impl], arguments)


def _run(primitive: str, name: str, implementation: Implementation, arguments: Mapping[str, Any]) -> Any:
    if (taken := _taken.get()) is not None:
        taken.append((primitive, name))
    return implementation.run(**arguments)
