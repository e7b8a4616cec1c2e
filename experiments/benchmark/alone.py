"""Measurements that each run in a process of their own, one after the other.

A measurement that fails, that the device has no memory for, or whose process ends costs nothing of the others, and each finds
the memory of the devices empty.
"""

import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

NO_MEMORY = "RESOURCE_EXHAUSTED", "Out of memory", "OUT_OF_MEMORY"

Measure = Callable[[str], dict[str, Any]]


def run(
    measure: Measure, names: Sequence[str], seconds: float, report: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """Returns a row for each name: what `measure` returns for it, or `failed` or `out_of_memory` with the reason.

    Args:
      measure: function of a module, or a `functools.partial` of one; it is sent to the processes.
      names: what to measure, in order.
      seconds: the longest that one measurement may take, compilation included.
      report: function called with each row as soon as it is known.
    """
    return [_reported(dict(case=name) | _in_process(measure, name, seconds), report) for name in names]


def _in_process(measure, name, seconds):
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(measure, name, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        return pipe.recv() if pipe.poll(seconds) else dict(failed=f"no result within {seconds:g} s")
    except EOFError:
        process.join()
        return dict(failed=f"the process ended with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _serve(measure: Measure, name: str, pipe: Connection) -> None:
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


def _reported(row, report):
    report(row)
    return row
