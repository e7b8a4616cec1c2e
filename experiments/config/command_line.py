"""What the commands of this folder share: exit codes, and errors of use without a traceback."""

import sys
import traceback

from experiments.data.cache import CorruptCacheError

EXIT_REFUSED = 2  # the command, the config or the work directory cannot be used; nothing was computed
EXIT_DIVERGED = 65  # a loss or gradient norm was not finite; running again would do the same
EXIT_INTERRUPTED = 75  # left early after saving; the same command goes on

# What a wrong argument, config, folder or data cache raises.
REFUSALS = (ValueError, TypeError, OSError, CorruptCacheError)


def refuse(error: Exception) -> int:
    """Says what cannot be used, and which line of the sources says so."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    print(f"{type(error).__name__}: {error}\n(from {where.filename}:{where.lineno})", file=sys.stderr)
    return EXIT_REFUSED
