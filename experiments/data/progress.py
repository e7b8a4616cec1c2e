"""Progress of work on data sets, on standard error."""

import sys

from tqdm import tqdm


def progress(description: str, total: int | None, unit: str) -> tqdm:
    """Returns a progress bar; in a log, which is no terminal, it prints a line every 15 seconds."""
    interval = 0.5 if sys.stderr.isatty() else 15.0
    return tqdm(desc=description, total=total, unit=f" {unit}", mininterval=interval)
