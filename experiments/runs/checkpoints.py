"""Checkpoints of a run: the only module that uses Orbax.

A checkpoint is a folder named by its step. It is written in the background under a temporary name, receives a manifest of
hashes (see `manifests`) and is renamed, so that a folder with a step's name is whole; the manifest is verified before the
checkpoint is used. It holds arrays by name, and a note: all else that training needs to resume, as JSON. Sharded arrays
are written by the processes that hold them, and read into any requested sharding; process 0 hashes, renames and deletes.
"""

import concurrent.futures
import errno
import json
import logging
import math
import os
import shutil
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from experiments.parallel import hosts
from experiments.runs import manifests

STATE, NOTE = "state", "note"
# Content of checkpoints up to version 0.1.0, which store parameters as vectors by group.
OLD = "arrays"
# What Orbax's own description of a checkpoint says, so that a lost manifest is noticed.
HAS_MANIFEST = {"manifest": manifests.NAME}
UNFINISHED, DELETED = ".unfinished", ".deleted"
# Folders that an ended process left; Orbax adds a suffix of its own while it writes.
LEFTOVERS = (f"*{UNFINISHED}*", f"*{DELETED}", "*.orbax-checkpoint-tmp*")


def _is_no_error_of_orbax(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR or "orbax" not in record.pathname


# Orbax logs each error with the stacks of its threads before it raises it, and a `CheckpointError` says it in one line.
logging.getLogger("absl").addFilter(_is_no_error_of_orbax)


class CheckpointError(OSError):
    """A checkpoint that cannot be written or read."""


class Checkpoints:
    """The checkpoints in a folder; a context manager that finishes writing at its end.

    Attributes:
      folder: the folder, as an absolute path.
    """

    def __init__(self, folder: Path, *, keep_last: int | None = None):
        """Opens the folder.

        Args:
          keep_last: number of newest checkpoints that a save keeps besides the best one. None opens for reading only, which
            changes nothing on disk.
        """
        self.folder, self._keep_last = folder.absolute(), keep_last
        self._writing: concurrent.futures.Future[None] | None = None
        self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        if keep_last is not None:
            if hosts.is_main():
                self.folder.mkdir(parents=True, exist_ok=True)
                for pattern in LEFTOVERS:
                    for path in self.folder.glob(pattern):
                        shutil.rmtree(path)
            hosts.wait_for_all("unfinished checkpoints")
        names = [path.name for path in self.folder.glob("*") if path.is_dir()]
        # Score of each complete checkpoint by its step, in order.
        self._scores = {
            step: _score(self.folder / str(step)) for step in sorted(int(n) for n in names if n.isdecimal())
        }

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._finish()
        finally:
            self._worker.shutdown()

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in increasing order."""
        return list(self._scores)

    @property
    def latest(self) -> int | None:
        """The newest step, or None."""
        return self.steps[-1] if self.steps else None

    @property
    def best(self) -> int | None:
        """The step of the highest score, the earliest of equals; None if none has a score."""
        return next(iter(self.from_best), None)

    @property
    def from_best(self) -> list[int]:
        """The steps that have a score, from the highest to the lowest, the earliest of equals first."""
        scored = [(score, step) for step, score in self._scores.items() if score is not None]
        return [step for _, step in sorted(scored, key=lambda pair: (-pair[0], pair[1]))]

    def save(
        self,
        step: int,
        arrays: Mapping[str, Any],
        note: Mapping[str, Any],
        *,
        score: float | None = None,
        provisional: bool = False,
    ) -> None:
        """Starts writing a checkpoint once any earlier one is written.

        Args:
          arrays: JAX or NumPy arrays by name. They must be neither changed nor donated until the checkpoint is written.
          score: validation score, higher is better; None or a number that is not finite is never the best.
          provisional: whether the score may be dropped later (see `drop_score`); the best of the others is kept too.

        Raises:
          CheckpointError: if this or the earlier checkpoint cannot be written.
        """
        if self._keep_last is None:
            raise ValueError("these checkpoints were opened for reading; give keep_last to write")
        self._finish()
        score = None if score is None or not math.isfinite(score) else float(score)
        temporary = self.folder / f"{step}{UNFINISHED}"
        content = {STATE: dict(arrays), NOTE: json.dumps(note)}
        context = ocp.Context()
        # Where a folder cannot be created, this raises here, and no thread of Orbax waits for the folder.
        context.asynchronous.create_directories_asynchronously = False
        try:
            with context:
                response = ocp.save_async(temporary, content, overwrite=True, custom_metadata=HAS_MANIFEST)
        except Exception as error:
            raise self._cannot_write(step, error) from error
        self._writing = self._worker.submit(self._complete, step, score, provisional, response)

    def _complete(self, step: int, score: float | None, provisional: bool, response: Any) -> None:
        """Waits until all processes have written their parts, and makes the folder a checkpoint."""
        temporary = self.folder / f"{step}{UNFINISHED}"
        try:
            response.result()  # ends the thread and the event loop that Orbax starts for each save, too
            if hosts.is_main():
                manifests.write(temporary, {"step": step, "score": score})
                self._remove(step)
                temporary.rename(self.folder / str(step))
        except Exception as error:
            raise self._cannot_write(step, error) from error
        self._scores = dict(sorted((self._scores | {step: score}).items()))
        self._prune(provisional)

    def prune(self, *, provisional: bool = False) -> None:
        """Deletes what a process that ended before it could do so would have deleted after its last save.

        Args:
          provisional: that of the newest checkpoint, see `save`.
        """
        self._finish()
        self._prune(provisional)

    def _prune(self, provisional: bool) -> None:
        kept = {*self.steps[-self._keep_last :], *self.from_best[:1]}
        if provisional:
            kept.update([known for known in self.from_best if known != self.latest][:1])
        for old in [known for known in self.steps if known not in kept]:
            if hosts.is_main():
                self._remove(old)
            self._scores = {known: score for known, score in self._scores.items() if known != old}

    def _remove(self, step: int) -> None:
        """Deletes a checkpoint, so that at no time its folder is there in part."""
        folder, gone = self.folder / str(step), self.folder / f"{step}{DELETED}"
        if folder.exists():
            folder.rename(gone)
            shutil.rmtree(gone)

    def _cannot_write(self, step: int, error: Exception) -> CheckpointError:
        for path in self.folder.glob(f"{step}{UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)
        reason = _first_line(error)
        return CheckpointError(f"the checkpoint of step {step} cannot be written to {self.folder}: {reason}")

    def _finish(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def intact(self, steps: Iterable[int]) -> int | None:
        """Returns the first of the steps whose checkpoint is as it was written; None if there is none.

        Each damaged one before it is named on standard error, and so is a checkpoint without a manifest, which is taken
        as it is. All processes must call it; process 0 reads the files.
        """
        found = None
        if hosts.is_main():
            found = next((step for step in steps if self._is_intact(step)), None)
        number = hosts.from_main(-1 if found is None else found)
        return None if number < 0 else number

    def _is_intact(self, step: int) -> bool:
        folder = self.folder / str(step)
        try:
            record = manifests.read(folder)
            if record is None:
                problem = _problem_without_manifest(folder)
            elif record["step"] != step:
                problem = f"it is that of step {record['step']}"
            else:
                problem = manifests.problem(folder, record)
        except (ValueError, OSError) as error:
            record, problem = None, str(error)
        if problem is not None:
            print(f"The checkpoint of step {step} is damaged and left out: {problem}.", file=sys.stderr)
        elif record is None:
            print(
                f"The checkpoint of step {step} has no {manifests.NAME} (versions up to 0.2.0 wrote none): "
                "whether it is damaged cannot be told.",
                file=sys.stderr,
            )
        return problem is None

    def set_aside_after(self, step: int) -> None:
        """Renames the checkpoints of later steps, which are damaged, to STEP.damaged; they do not count any more."""
        for later in [known for known in self.steps if known > step]:
            if hosts.is_main():
                aside = self.folder / f"{later}{manifests.DAMAGED}"
                shutil.rmtree(aside, ignore_errors=True)
                (self.folder / str(later)).rename(aside)
            del self._scores[later]

    def drop_score(self, step: int) -> None:
        """Makes an intact checkpoint one without a score."""
        if hosts.is_main():
            manifests.write(self.folder / str(step), {"step": step, "score": None})
        self._scores[step] = None

    def shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the arrays of a step by name, without reading the arrays.

        Raises:
          ValueError: if there is no checkpoint of that step, or it is of a version with other content.
          CheckpointError: if it cannot be read.
        """
        if step not in self.steps:
            raise ValueError(f"there is no checkpoint of step {step}; there are {self.steps or 'none'}")
        try:
            content = ocp.metadata(self.folder / str(step)).metadata
        except Exception as error:
            raise self._cannot_read(step, error) from error
        if STATE not in content:
            version = "0.1.0" if OLD in content else "another program"
            raise ValueError(
                f"the checkpoint of step {step} was written by version {version}, whose format this version does not read; "
                f"resume it with version {version}, or train anew in another workdir"
            )
        return {name: tuple(array.shape) for name, array in content[STATE].items()}

    def load(
        self, step: int, like: Mapping[str, jax.ShapeDtypeStruct] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the arrays and the note of a step, unverified (see `intact`).

        Args:
          like: shapes, dtypes and shardings by name; every process reads only what its devices hold. None for NumPy arrays.

        Raises:
          ValueError, CheckpointError: if there is no checkpoint of that step, or it cannot be read (see `shapes`).
        """
        names = self.shapes(step)
        wanted = None if like is None else {STATE: {name: like[name] for name in names}, NOTE: ""}
        try:
            with warnings.catch_warnings():
                # NumPy arrays have no sharding that could be given.
                warnings.filterwarnings("ignore", message="Sharding info not provided")
                content = ocp.load(self.folder / str(step), wanted)
            note = json.loads(content[NOTE])
        except Exception as error:
            raise self._cannot_read(step, error) from error
        if like is None:
            content[STATE] = {name: np.asarray(array) for name, array in content[STATE].items()}
        return content[STATE], note

    def _cannot_read(self, step: int, error: Exception) -> CheckpointError:
        reason = _first_line(error)
        return CheckpointError(f"the checkpoint of step {step} in {self.folder} cannot be read: {reason}")

    def wait(self) -> None:
        """Returns when all checkpoints are on disk, in every process.

        Raises:
          CheckpointError: if the last one cannot be written.
        """
        self._finish()
        hosts.wait_for_all("checkpoints")


def _score(folder: Path) -> float | None:
    """Returns the score of a checkpoint, or None if it has none or it cannot be read."""
    try:
        record = manifests.read(folder)
        if record is None:  # versions up to 0.2.0 leave it to Orbax
            record = json.loads((folder / "metrics" / "metrics").read_bytes())
        return record["score"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _problem_without_manifest(folder: Path) -> str | None:
    """Returns what is wrong with the descriptions that Orbax writes, or None."""
    descriptions = [folder / "_CHECKPOINT_METADATA", *folder.glob("*/_METADATA")]
    if len(descriptions) < 2:
        return "it is incomplete"
    for path in descriptions:
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            return f"{path.relative_to(folder)} cannot be read ({error})"
        if isinstance(content, dict) and content.get("custom_metadata") == HAS_MANIFEST:
            return f"{manifests.NAME} is missing"
    return None


def _first_line(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    full = os.strerror(errno.ENOSPC)  # Orbax says it at the end of a long line
    return full if full in text else text.splitlines()[0][:300]


def choose_step(checkpoints: Checkpoints, which: str) -> int:
    """Returns the step that "best", "last" or a number means, among the checkpoints that are intact.

    Raises:
      ValueError: if there is no such checkpoint; the message names the steps that have one.
      CheckpointError: if it is damaged.
    """
    if which not in ("best", "last") and not which.isdecimal():
        raise ValueError(f"checkpoint={which!r}; expected best, last or a step")
    wanted = {"best": checkpoints.from_best, "last": checkpoints.steps[::-1]}
    steps = [int(which)] if which.isdecimal() else wanted[which]
    if not steps or steps[0] not in checkpoints.steps:
        known = ", ".join(map(str, checkpoints.steps)) or "none"
        raise ValueError(f"checkpoint={which}: there is no such checkpoint; steps with one: {known}")
    step = checkpoints.intact(steps)
    if step is None:
        others = ", ".join(str(known) for known in checkpoints.steps if known not in steps) or "none"
        raise CheckpointError(f"checkpoint={which}: it is damaged; steps with other checkpoints: {others}")
    return step
