"""Measurements that are prepared in parallel processes and made sequentially.

Python traces one program at a time per process, and tracing kernels takes longer than compiling them. Nothing compiles
during a measurement.
"""

import contextlib
import itertools
import multiprocessing
from collections.abc import Callable, Hashable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

Say = Callable[[str], None]


class Ready(NamedTuple):
    """A prepared measurement: the function that returns its rows, and the bytes of device memory that it needs."""

    measure: Callable[[], list[dict[str, Any]]]
    peak_bytes: int


Prepare = Callable[[Any, Say], Ready]


class EndedEarly(RuntimeError):
    """Processes ended before their measurements."""


def run(
    prepare: Prepare,
    keys: Sequence[Hashable],
    workers: int,
    report: Callable[[dict[str, Any]], None],
    say: Say,
) -> list[dict[str, Any]]:
    """Returns the rows of all keys, in order: prepared in parallel, then measured sequentially.

    The process that needs the least memory measures first, and releases its memory before the next one starts.

    Args:
      prepare: function of a module, or a `functools.partial` of one; it is sent between processes with its keys and rows.
      workers: number of processes; with one, everything runs in this process, in order.
      report: function called with each row as soon as it is known.
      say: function called with the messages of `prepare`.

    Raises:
      EndedEarly: processes ended early, for example by an error, which is on their standard error. The measurements of
        the others are reported first.
    """
    if workers == 1 or len(keys) < 2:
        prepared = [prepare(key, say) for key in keys]
        return [_reported(row, report) for ready in prepared for row in ready.measure()]
    context = multiprocessing.get_context("spawn")
    started = {}
    try:
        for part in _parts(keys, workers):
            pipe, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(prepare, part, theirs), daemon=True)
            process.start()
            theirs.close()
            started[pipe] = process, part
        needs = _prepared(list(started), say)
        rows = {}
        for pipe in sorted((pipe for pipe in started if pipe in needs), key=needs.get):
            rows[pipe] = _measured(pipe, report)
            started[pipe][0].join()
        lost = [part for process, part in started.values() if process.join() or process.exitcode]
    finally:
        for process, _ in started.values():
            process.kill()
    if lost:
        raise EndedEarly(f"processes ended that had to measure {', '.join(str(k) for p in lost for k in p)}")
    return [row for pipe in started for row in rows[pipe]]


def _prepared(pipes: list[Connection], say: Say) -> dict[Connection, int]:
    """Returns the bytes that each process needs, once all are ready or have ended; those that ended are left out."""
    waiting, needs = set(pipes), {}
    while waiting:
        for pipe in wait(waiting):
            what, value = _received(pipe)
            if what == "said":
                say(value)
                continue
            waiting.remove(pipe)
            if what == "ready":
                needs[pipe] = value
    return needs


def _measured(pipe: Connection, report: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    with contextlib.suppress(BrokenPipeError):  # the process has ended; the next line detects that
        pipe.send("measure")
    rows = []
    while (message := _received(pipe))[0] == "row":
        rows.append(_reported(message[1], report))
    return rows


def _parts(keys: Sequence[Hashable], workers: int) -> list[Sequence[Hashable]]:
    """Returns the keys in contiguous parts, so that a process ends when its part is measured."""
    count = min(workers, len(keys))
    bounds = [len(keys) * i // count for i in range(count + 1)]
    return [keys[low:high] for low, high in itertools.pairwise(bounds)]


def _serve(prepare: Prepare, keys: Sequence[Hashable], pipe: Connection) -> None:
    prepared = [prepare(key, lambda line: pipe.send(("said", line))) for key in keys]
    pipe.send(("ready", max(ready.peak_bytes for ready in prepared)))
    pipe.recv()
    for ready in prepared:
        for row in ready.measure():
            pipe.send(("row", row))


def _received(pipe: Connection) -> tuple[str, Any]:
    try:
        return pipe.recv()
    except EOFError:
        return "ended", None


def _reported(row: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    report(row)
    return row
