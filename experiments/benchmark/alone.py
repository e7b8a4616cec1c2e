"""Measurements that each run in a process of their own.

A measurement that fails, that the device has no memory for, or whose process ends costs nothing of the others. Several
processes may prepare, trace and compile beside each other; what is timed runs in `turn`, one after the other.
"""

import contextlib
import multiprocessing
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

NO_MEMORY = "RESOURCE_EXHAUSTED", "Out of memory", "OUT_OF_MEMORY"

Measure = Callable[[str], dict[str, Any]]
_lock: Any = contextlib.nullcontext()


class Started(NamedTuple):
    """A process that measures, and the pipe on which its row comes."""

    name: str
    process: Any
    pipe: Connection


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
      seconds: the longest that one measurement may take after the one before it, compilation included.
      report: function called with each row in order, as soon as it is known.
      workers: the most processes at a time.
    """
    context = multiprocessing.get_context("spawn")
    lock, waiting, started = context.Lock(), deque(names), deque[Started]()
    rows = []
    try:
        while waiting or started:
            while waiting and len(started) < workers:
                started.append(_start(context, measure, waiting.popleft(), lock))
            rows.append(_row(started[0], seconds))
            _end(started.popleft())
            report(rows[-1])
    finally:
        for one in started:
            _end(one)
    return rows


def turn() -> contextlib.AbstractContextManager[Any]:
    """Context in which no other process of the same `run` measures."""
    return _lock


def _start(context, measure, name, lock) -> Started:
    pipe, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(measure, name, theirs, lock), daemon=True)
    process.start()
    theirs.close()
    return Started(name, process, pipe)


def _row(one: Started, seconds: float) -> dict[str, Any]:
    try:
        found = one.pipe.recv() if one.pipe.poll(seconds) else dict(failed=f"no result within {seconds:g} s")
    except EOFError:
        one.process.join()
        found = dict(failed=f"the process ended with exit code {one.process.exitcode}")
    return dict(case=one.name) | found


def _end(one: Started) -> None:
    one.process.kill()
    one.process.join()


def _serve(measure: Measure, name: str, pipe: Connection, lock: Any) -> None:
    global _lock
    _lock = lock
    try:
        row = measure(name)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is a row of the table
        row = {"out_of_memory" if lacks_memory(error) else "failed": reason(error)}
    pipe.send(row)


def lacks_memory(error: Exception) -> bool:
    """Returns whether an error says that a device has too little memory."""
    return any(text in str(error) for text in NO_MEMORY)


def reason(error: Exception) -> str:
    """Returns the type of an error and the first line of its message."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
