"""What the layers of a stack give, for a loss or an analysis that reads more than the output of a model."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from layers.typing import Array, Float

_records: ContextVar[list | None] = ContextVar("records", default=None)


@contextlib.contextmanager
def recording() -> Iterator[list[Float[Array, "b t d"]]]:
    """Yields a list to which a stack that is called inside adds the stream after each of its layers, in order.

    A stack with stacked layers (`scan`), two streams (`reversible`), or a route past layers raises ValueError inside.
    """
    found: list[Float[Array, "b t d"]] = []
    token = _records.set(found)
    try:
        yield found
    finally:
        _records.reset(token)


def is_recording() -> bool:
    """Returns whether a `recording` is under way."""
    return _records.get() is not None


def record(x: Float[Array, "b t d"]) -> None:
    """Adds the stream after a layer to the recording, if one is under way."""
    if (found := _records.get()) is not None:
        found.append(x)
