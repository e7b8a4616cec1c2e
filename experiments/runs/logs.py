"""The logs of a run: JSON lines, TensorBoard, Weights & Biases and a progress bar.

A line is one JSON object with "kind" ("train", "validation" or "test"), "step", "epoch" and measurements. Train lines
hold averages over the steps since the previous line, validation lines those over the split.
"""

import importlib
import json
import math
import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from experiments.runs.files import write_atomically


class Sink(Protocol):
    """A log of measurements."""

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Writes the measurements of one line."""

    def close(self) -> None:
        """Finishes writing."""


class MetricsFile:
    """The log as JSON lines."""

    def __init__(self, path: Path, *, after_step: int):
        """Opens the file to resume after a step; lines of later steps, and of tests, are removed."""
        cut_after(path, after_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        line = {"kind": kind, "step": step} | {name: _finite(value) for name, value in values.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a log; one that a crash cut short is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def cut_after(path: Path, step: int) -> None:
    """Keeps the lines up to `step` and drops those of tests, so that a run resumed there repeats none."""
    kept = [line for line in read_lines(path) if line["step"] <= step and line["kind"] != "test"]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))


class TensorBoard:
    """Event files. Needs the package tensorboardX."""

    def __init__(self, folder: Path, *, after_step: int):
        """Opens a new event file; later steps in older files are hidden."""
        writer = importlib.import_module("tensorboardX").SummaryWriter
        self._writer = writer(str(folder), purge_step=after_step + 1)

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A Weights & Biases run, the same one in every session. Needs the package wandb."""

    def __init__(self, project: str, folder: Path, config: Mapping[str, Any]):
        """Opens the run; its id is stored in the folder of the run."""
        wandb = importlib.import_module("wandb")
        file = folder / "wandb-id.txt"
        known = file.read_text(encoding="utf-8").strip() if file.exists() else None
        self._run = wandb.init(
            project=project, dir=str(folder), config=dict(config), id=known, resume="allow" if known else None
        )
        write_atomically(file, self._run.id + "\n")

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self._run.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


class Logs:
    """All sinks of a run; a context manager that closes them."""

    def __init__(
        self,
        folder: Path,
        *,
        after_step: int,
        config: Mapping[str, Any],
        tensorboard: bool,
        wandb: str | None,
    ):
        """Opens the sinks in the folder of a run that resumes after a step.

        A sink whose package is missing is left out, with a message.
        """
        self._sinks: list[Sink] = [MetricsFile(folder / "metrics.jsonl", after_step=after_step)]
        if tensorboard:
            self._add("tensorboardX", lambda: TensorBoard(folder / "tensorboard", after_step=after_step))
        if wandb is not None:
            self._add("wandb", lambda: WandB(wandb, folder, config))

    def _add(self, package: str, make: Any) -> None:
        try:
            self._sinks.append(make())
        except ModuleNotFoundError as error:
            if error.name != package:
                raise
            print(
                f"{package} is not installed, so this log is left out; to enable it: pip install {package}",
                file=sys.stderr,
            )

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Sends the measurements of one line to every sink."""
        for sink in self._sinks:
            sink.write(kind, step, values)

    def __enter__(self) -> "Logs":
        return self

    def __exit__(self, *_: object) -> None:
        with ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(sink.close)


def progress_bar(*, step: int, total: int, shown: bool = True) -> tqdm:
    """Returns a bar over the training steps with the remaining time; it prints nothing if not `shown`."""
    interval = 0.5 if sys.stderr.isatty() else 30.0  # a log file needs fewer lines
    return tqdm(
        initial=step,
        total=total,
        unit="step",
        mininterval=interval,
        dynamic_ncols=True,
        smoothing=0.05,
        disable=not shown,
    )
