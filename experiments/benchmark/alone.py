"""Measurements that each run in a process of their own.

A measurement that fails, that the device has no memory for, that does not end, or whose process ends costs nothing of the others. Several
processes may prepare, trace and compile beside each other; what is timed runs in `turn`, one after the other.
"""

import contextlib
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any

NO_MEMORY = "RESOURCE_EXHAUSTED", "Out of memory", "OUT_OF_MEMORY"
PREPARING, WAITING, MEASURING = range(3)
POLL = 0.2  # seconds between two looks at the stages of the processes

Measure = Callable[[str], dict[str, Any]]
_turn: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


class _Started:
    """A process that measures, the pipe on which its row comes, and its stage with the number of its changes."""

    def __init__(self, context: Any, measure: Measure, name: str, lock: Any):
        self.name, self.stage = name, context.Array("i", [PREPARING, 0], lock=False)
        self.pipe, theirs = context.Pipe(duplex=False)
        self.process = context.Process(
            target=_serve, args=(measure, name, theirs, lock, self.stage), daemon=True
        )
        self._seen, self._since = 0, time.monotonic()
        self.process.start()
        theirs.close()

    def row(self, ready: bool, seconds: float) -> dict[str, Any] | None:
        """Returns the row if there is one or its time is up, else None."""
        found = None
        if ready:
            try:
                found = self.pipe.recv()
            except EOFError:
                self.process.join()
                found = dict(failed=f"the process ended with exit code {self.process.exitcode}")
        else:
            stage, changes = self.stage
            if changes != self._seen:
                self._seen, self._since = changes, time.monotonic()
            if stage != WAITING and time.monotonic() - self._since > seconds:
                found = dict(failed=f"no result within {seconds:g} s")
        return None if found is None else dict(case=self.name) | found

    def end(self, lock: Any) -> None:
        """Ends the process, and passes its turn on."""
        self.process.kill()
        self.process.join()
        if self.stage[0] == MEASURING:
            lock.release()


def run(
    measure: Measure,
    names: Sequence[str],
    seconds: float,
    report: Callable[[dict[str, Any]], None],
    workers: int = 1,
) -> list[dict[str, Any]]:
    """Returns a row for each name: what `measure` returns for it, or `failed` or `out_of_memory` with the reason.

    Args:
      measure: function of a module, or a `functools.partial` of one; it is sent to the processes.
      names: what to measure, in order.
      seconds: the longest that one measurement may prepare, and that its turn may take; waiting for the turn does not count.
      report: function called with each row in order, as soon as it and those before it are known.
      workers: the most processes at a time.
    """
    context = multiprocessing.get_context("spawn")
    lock, waiting, started = context.Lock(), deque(names), list[_Started]()
    known, rows = dict[str, dict[str, Any]](), list[dict[str, Any]]()
    try:
        while waiting or started:
            while waiting and len(started) < workers:
                started.append(_Started(context, measure, waiting.popleft(), lock))
            ready = connection.wait([one.pipe for one in started], timeout=POLL)
            for one in tuple(started):
                row = one.row(one.pipe in ready, seconds)
                if row is not None:
                    known[one.name] = row
                    started.remove(one)
                    one.end(lock)
            while len(rows) < len(names) and names[len(rows)] in known:
                rows.append(known[names[len(rows)]])
                report(rows[-1])
    finally:
        for one in started:
            one.end(lock)
    return rows


def turn() -> contextlib.AbstractContextManager[Any]:
    """Context in which no other process of the same `run` measures."""
    return _turn()


def _serve(measure: Measure, name: str, pipe: connection.Connection, lock: Any, stage: Any) -> None:
    global _turn

    @contextlib.contextmanager
    def take() -> Iterator[None]:
        _enter(stage, WAITING)
        with lock:
            _enter(stage, MEASURING)
            try:
                yield
            finally:
                _enter(stage, PREPARING)

    _turn = take
    try:
        row = measure(name)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is a row of the table
        row = {"out_of_memory" if lacks_memory(error) else "failed": reason(error)}
    pipe.send(row)


def _enter(stage: Any, value: int) -> None:
    stage[0], stage[1] = value, stage[1] + 1


def lacks_memory(error: Exception) -> bool:
    """Returns whether an error says that a device has too little memory."""
    return any(text in str(error) for text in NO_MEMORY)


def reason(error: Exception) -> str:
    """Returns the type of an error and the first line of its message."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
