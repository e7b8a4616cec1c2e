"""Prepares measurements in several processes at once, then lets them measure in turn.

Python traces one program at a time in a process, and tracing kernels takes longer than compiling them. Nothing compiles
while something is timed.
"""

import contextlib
import itertools
import multiprocessing
from collections.abc import Callable, Hashable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

Say = Callable[[str], None]
Measure = Callable[[], list[dict[str, Any]]]
Prepare = Callable[[Any, Say], Measure]


class EndedEarly(RuntimeError):
    """Processes ended before they had measured what they had to."""


def run(
    prepare: Prepare,
    keys: Sequence[Hashable],
    workers: int,
    report: Callable[[dict[str, Any]], None],
    say: Say,
) -> list[dict[str, Any]]:
    """Rows of every key: `prepare(key, say)()`, prepared side by side and measured one after another, in order.

    Args:
      prepare: a function of a module, or a `functools.partial` of one; with its keys and rows, it is sent between processes.
      workers: processes; with one, everything happens in this process.
      report: gets each row as soon as it is known.
      say: gets the lines that `prepare` says.

    Raises:
      EndedEarly: as processes do that raise something, which is then on their standard error. All that the others measure is
        reported before.
    """
    if workers == 1 or len(keys) < 2:
        ready = [prepare(key, say) for key in keys]
        return [_reported(row, report) for measure in ready for row in measure()]
    context = multiprocessing.get_context("spawn")
    started = {}
    try:
        for part in _parts(keys, workers):
            pipe, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(prepare, part, theirs), daemon=True)
            process.start()
            theirs.close()
            started[pipe] = process, part
        rows = _measured(_prepared(list(started), say), report)
        lost = [part for process, part in started.values() if process.join() or process.exitcode]
    finally:
        for process, _ in started.values():
            process.kill()
    if lost:
        raise EndedEarly(f"processes ended that had to measure {', '.join(str(k) for p in lost for k in p)}")
    return rows


def _prepared(pipes: list[Connection], say: Say) -> list[Connection]:
    """Waits until every process is ready or has ended; those that are ready."""
    waiting, ended = set(pipes), set()
    while waiting:
        for pipe in wait(waiting):
            what, value = _received(pipe)
            if what == "said":
                say(value)
                continue
            waiting.remove(pipe)
            if what == "ended":
                ended.add(pipe)
    return [pipe for pipe in pipes if pipe not in ended]


def _measured(pipes: list[Connection], report: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    rows = []
    for pipe in pipes:
        with contextlib.suppress(BrokenPipeError):  # it has ended since; the next line finds that out
            pipe.send("measure")
        while (message := _received(pipe))[0] == "row":
            rows.append(_reported(message[1], report))
    return rows


def _parts(keys: Sequence[Hashable], workers: int) -> list[Sequence[Hashable]]:
    """Neighbours together, so that a process ends when its part is measured."""
    count = min(workers, len(keys))
    bounds = [len(keys) * i // count for i in range(count + 1)]
    return [keys[low:high] for low, high in itertools.pairwise(bounds)]


def _serve(prepare: Prepare, keys: Sequence[Hashable], pipe: Connection) -> None:
    measurements = [prepare(key, lambda line: pipe.send(("said", line))) for key in keys]
    pipe.send(("ready", None))
    pipe.recv()
    for measure in measurements:
        for row in measure():
            pipe.send(("row", row))


def _received(pipe: Connection) -> tuple[str, Any]:
    try:
        return pipe.recv()
    except EOFError:
        return "ended", None


def _reported(row: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    report(row)
    return row
