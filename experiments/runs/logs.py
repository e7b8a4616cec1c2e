"""The logs of a run: JSON lines, TensorBoard, Weights & Biases and a progress bar.

A line is one JSON object with "kind" ("train", "validation" or "test"), "step", "epoch" and measurements. Train lines
hold averages over the steps since the previous line, validation lines those over the split.
"""

import hashlib
import importlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from experiments.runs import trusted
from experiments.runs.files import read_json_lines, to_json_line, write_atomically

WANDB_ID = "wandb-id.txt"


class Sink(Protocol):
    """A log of measurements."""

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Writes the measurements of one line."""

    def close(self) -> None:
        """Finishes writing."""


class MetricsFile:
    """The log as JSON lines."""

    def __init__(
        self,
        path: Path,
        *,
        after_step: int,
        seal: Mapping[str, Any] | None = None,
        drop_validation: bool = False,
    ):
        """Opens the file to resume after a step; lines of later steps, and of tests, are removed.

        Args:
          drop_validation: whether the validation of that step is removed too.
          seal: `seal` of the file at that step, from the checkpoint. If the lines differ from it, one line on standard
            error says so.
        """
        kept, problems = cut_after(path, after_step)
        self._count, self._hash = len(kept), hashlib.blake2b("".join(kept).encode(), digest_size=16)
        if seal is not None and self.seal != seal:
            lost = seal["lines"] - self._count
            what = f"{lost} of {seal['lines']} lines" if lost > 0 else "some lines"
            first = f"; {problems[0]}" if problems else ""
            print(
                f"{path}: {what} up to step {after_step} are lost or changed, and the rest is kept{first}",
                file=sys.stderr,
            )
        if drop_validation:
            lines = [
                line for line in _read(path)[0] if (line["kind"], line["step"]) != ("validation", after_step)
            ]
            kept = [to_json_line(line) for line in lines]
            write_atomically(path, "".join(kept))
            self._count, self._hash = len(kept), hashlib.blake2b("".join(kept).encode(), digest_size=16)
        self._file = path.open("a", encoding="utf-8")

    @property
    def seal(self) -> dict[str, Any]:
        """Number and hash of the lines so far, as JSON."""
        return {"lines": self._count, "blake2b": self._hash.hexdigest()}

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        line = to_json_line({"kind": kind, "step": step} | dict(values))
        self._file.write(line)
        self._file.flush()
        self._count += 1
        self._hash.update(line.encode())

    def close(self) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a log; cut or damaged ones are named on standard error and left out."""
    lines, problems = _read(path)
    for problem in problems:
        print(f"{problem}; it is left out", file=sys.stderr)
    return lines


def _read(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    def check(line: Mapping[str, Any]) -> None:
        if not isinstance(line["step"], int):
            raise ValueError(f"its step is {line['step']!r}")

    return read_json_lines(path, ("kind", "step"), check)


def cut_after(path: Path, step: int) -> tuple[list[str], list[str]]:
    """Keeps the lines up to `step` and drops those of tests, so that a run resumed there repeats none.

    Returns:
      The kept lines, and a description of each cut or damaged line.
    """
    lines, problems = _read(path)
    kept = [to_json_line(line) for line in lines if line["step"] <= step and line["kind"] != "test"]
    write_atomically(path, "".join(kept))
    return kept, problems


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
        file = folder / WANDB_ID
        if problem := trusted.problem(file):
            print(f"{problem}; a new run of Weights & Biases begins", file=sys.stderr)
        known = file.read_text(encoding="utf-8").strip() if file.exists() and not problem else None
        self._run = wandb.init(
            project=project, dir=str(folder), config=dict(config), id=known, resume="allow" if known else None
        )
        trusted.write(folder, {WANDB_ID: self._run.id + "\n"})

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
        seal: Mapping[str, Any] | None = None,
        drop_validation: bool = False,
    ):
        """Opens the sinks in the folder of a run that resumes after a step.

        A sink whose package is missing is left out, with a message.

        Args:
          seal: `seal` of the logs at that step.
          drop_validation: whether the validation of that step is removed.
        """
        path = folder / "metrics.jsonl"
        self._file = MetricsFile(path, after_step=after_step, seal=seal, drop_validation=drop_validation)
        self._sinks: list[Sink] = [self._file]
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

    @property
    def seal(self) -> dict[str, Any]:
        """Number and hash of the lines so far, by which a later session sees whether any is lost."""
        return self._file.seal

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
    return tqdm(
        initial=step,
        total=total,
        unit="step",
        mininterval=_bar_interval(),
        dynamic_ncols=True,
        smoothing=0.05,
        disable=not shown,
    )


def _bar_interval() -> float:
    return 0.5 if sys.stderr.isatty() else 30.0  # a log file needs fewer lines


@contextmanager
def elapsing(bar: tqdm, what: str) -> Iterator[None]:
    """Shows on the bar what goes on within the context, where no step moves it, and the seconds since its start."""
    start, over = time.monotonic(), threading.Event()
    bar.set_description(what)

    def show() -> None:
        while not over.wait(1.0 if sys.stderr.isatty() else 10.0):
            bar.set_description(f"{what} for {time.monotonic() - start:.0f} s")

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
