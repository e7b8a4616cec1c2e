"""Requests to interrupt training: signals and a time limit."""

import os
import signal
import sys
import time
from types import FrameType

SIGNALS = (
    (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    if hasattr(signal, "SIGHUP")
    else (signal.SIGTERM, signal.SIGINT)
)


class Interrupted(Exception):
    """Training stopped on request after saving a checkpoint."""


class Stop:
    """A request to stop training, by a signal or a time limit.

    As a context manager it catches SIGTERM, SIGINT and SIGHUP: the first signal is a request, the second ends the process
    at once. While there is nothing to save, as during compilation, the first one ends it too, with the exit code of an
    interruption.

    Attributes:
      reason: reason to stop, or None without a request.
      nothing_to_save: whether all steps taken so far are on disk.
    """

    nothing_to_save = False

    def __init__(self, *, after_seconds: float | None = None, exit_code: int = 75):
        """Creates an object that requests to stop `after_seconds` from now, if given.

        Args:
          exit_code: exit code of a process that a signal ends where there is nothing to save.

        Raises:
          ValueError: if `after_seconds` is not positive.
        """
        if after_seconds is not None and not after_seconds > 0:
            raise ValueError(f"stop_after_seconds={after_seconds}; expected more than 0")
        self._deadline = None if after_seconds is None else time.monotonic() + after_seconds
        self._exit_code = exit_code
        self._signal: str | None = None
        self._previous: dict[int, object] = {}

    @property
    def reason(self) -> str | None:
        if self._signal is None and self._deadline is not None and time.monotonic() >= self._deadline:
            return "the time limit"
        return self._signal

    def __enter__(self) -> "Stop":
        self._previous = {number: signal.signal(number, self._catch) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _catch(self, number: int, _: FrameType | None) -> None:
        if self.nothing_to_save:
            name = signal.Signals(number).name
            print(
                f"\nLeft at once because of {name}: nothing is lost. The same command resumes.",
                file=sys.stderr,
            )
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self._exit_code)  # threads of the compiler would delay an ordinary exit
        if self._signal is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._signal = signal.Signals(number).name
        print(f"\n{self._signal}: saving at the end of this step; once more ends at once", file=sys.stderr)
