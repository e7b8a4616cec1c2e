"""Runs of `experiments.train`, each in a process of its own, one after the other or beside each other."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from experiments.runs.interrupts import SIGNALS

POLL = 0.1  # seconds between two looks at the processes


class Trainings:
    """A context in which processes of `experiments.train` run, to which the signals of this process are passed on.

    Processes that still run when the context is left are ended, and save before.

    Attributes:
      signalled: whether a signal has come; nothing more should be started then.
    """

    def __init__(self):
        self.signalled = False
        self._running: dict[int, subprocess.Popen] = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._pass_on) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._running.values():  # those that an error has left behind
            process.terminate()
            process.wait()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __len__(self) -> int:
        return len(self._running)

    def start(
        self,
        key: int,
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        """Starts a run.

        Args:
          key: what `ended` names it by.
          environment: variables that it sees beside those of this process.
          log: file to which its output is appended; None for that of this process.
        """
        command = [sys.executable, "-m", "experiments.train", *arguments]
        options = dict(env=os.environ | dict(environment or {}), process_group=0)
        # It has its own process group, so that Ctrl-C reaches it once, from this process.
        if log is None:
            self._running[key] = subprocess.Popen(command, **options)
        else:
            with log.open("ab") as output:
                self._running[key] = subprocess.Popen(
                    command, stdout=output, stderr=subprocess.STDOUT, **options
                )

    def ended(self) -> tuple[int, int]:
        """Waits until a run ends; returns its key and its exit code, that of shells if a signal ended it."""
        while True:
            for key, process in self._running.items():
                if (code := process.poll()) is not None:
                    del self._running[key]
                    return key, code if code >= 0 else 128 - code
            time.sleep(POLL)

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        self.signalled = True
        for process in self._running.values():
            process.send_signal(number)


def run_training(arguments: Sequence[str]) -> int:
    """Runs `experiments.train` in its own process, passes signals to it, and returns its exit code."""
    with Trainings() as trainings:
        trainings.start(0, arguments)
        return trainings.ended()[1]
