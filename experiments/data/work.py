"""What generators of data sets share: their processes, and what they refuse. It needs nothing but Python."""

import os
from collections.abc import Iterable
from typing import Any


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_died(what: str) -> RuntimeError:
    """Returns the error of a worker process that draws `what` and died."""
    return RuntimeError(
        f"a worker process that draws {what} died: it was killed (out of memory?), or the script that asked for the data "
        "does so at its top level; put that under `if __name__ == '__main__':`, or use workers=1"
    )


def refuse_beside_files(official_dir: Any, generating: Iterable[str]) -> None:
    """Raises ValueError if options of a generator are given beside official files, which leave them without effect."""
    if names := ", ".join(generating):
        raise ValueError(
            f"official_dir={str(official_dir)!r} reads files, so {names} would have no effect; leave out one or the other"
        )
