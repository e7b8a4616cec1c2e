"""What the commands of this folder share: quiet libraries, exit codes, and errors of use without a traceback."""

import sys
from collections.abc import Callable

from absl import app, flags, logging

from experiments.data.cache import CorruptCacheError

EXIT_REFUSED = 2  # the command, the config or the work directory cannot be used; nothing was computed
EXIT_DIVERGED = 65  # a loss or gradient norm was not finite; running again would do the same
EXIT_INTERRUPTED = 75  # left early after saving; the same command goes on

# What a wrong argument, config, folder or data cache raises.
REFUSALS = (ValueError, TypeError, FileNotFoundError, CorruptCacheError)


def run(main: Callable[[list[str]], int], *, required: list[str]) -> None:
    """Parses flags, runs `main` and exits with the code that it returns.

    Args:
      required: flags that must be given.
    """
    flags.mark_flags_as_required(required)

    def quietly(argv: list[str]) -> int:
        if argv[1:]:
            raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
        if flags.FLAGS.verbosity <= 0:  # absl's default shows every step of every library
            logging.set_verbosity(logging.WARNING)
        return main(argv)

    app.run(quietly)


def refuse(error: Exception) -> int:
    """Says what cannot be used; with --verbosity=1 raises instead, to show where."""
    if flags.FLAGS.verbosity > 0:
        raise error
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return EXIT_REFUSED
