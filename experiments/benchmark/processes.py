"""Prepares measurements in several processes at once, then lets them measure in turn.

Python traces one program at a time in a process, and tracing kernels takes longer than compiling them. Nothing compiles
while something is timed.
"""

import itertools
import multiprocessing
from collections.abc import Callable, Hashable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

Say = Callable[[str], None]
Measure = Callable[[], list[dict[str, Any]]]
Prepare = Callable[[Any, Say], Measure]


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
      RuntimeError: a process ended early; what it raised is on its standard error.
    """
    if workers == 1 or len(keys) < 2:
        ready = [prepare(key, say) for key in keys]
        return [_reported(row, report) for measure in ready for row in measure()]
    context = multiprocessing.get_context("spawn")
    rows, started = [], []
    try:
        for part in _parts(keys, workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(prepare, part, theirs), daemon=True)
            process.start()
            theirs.close()
            started.append((process, ours, part))
        waiting = {pipe: part for _, pipe, part in started}
        while waiting:
            for pipe in wait(list(waiting)):
                what, value = _received(pipe, waiting[pipe])
                if what == "said":
                    say(value)
                else:
                    del waiting[pipe]
        for process, pipe, part in started:
            pipe.send("measure")
            while (message := _received(pipe, part))[0] != "done":
                rows.append(_reported(message[1], report))
            process.join()  # it gives its memory back before the next needs it
    finally:
        for process, *_ in started:
            process.kill()
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
    pipe.send(("done", None))


def _received(pipe: Connection, part: Sequence[Hashable]) -> tuple[str, Any]:
    try:
        return pipe.recv()
    except EOFError:
        raise RuntimeError(f"the process that had to measure {', '.join(map(str, part))} ended") from None


def _reported(row: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    report(row)
    return row
