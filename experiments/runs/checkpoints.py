"""Checkpoints of a run: the only module that uses Orbax.

A checkpoint is a folder named by its step, written in the background under a temporary name and renamed when it is
complete, so that a folder with a step's name is whole. It holds arrays by name, and a note: all else that training needs
to resume, as JSON. Sharded arrays are written by the processes that hold them, and read into any requested sharding.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from experiments.parallel import hosts

SCORE = "score"
STATE, NOTE = "state", "note"
# Content of checkpoints up to version 0.1.0, which store parameters as vectors by group.
OLD = "arrays"
UNFINISHED = "*.orbax-checkpoint-tmp*"


class _KeepBestAndLast:
    """An Orbax preservation policy: the best score (the earliest of equals) and the newest few."""

    def __init__(self, last: int):
        self._last = last

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        kept = {checkpoint.step for checkpoint in checkpoints[-self._last :]} | {_best(checkpoints)}
        return [checkpoint.step in kept for checkpoint in checkpoints]


def _best(checkpoints: Sequence[Any]) -> int | None:
    scored = [c for c in checkpoints if c.metrics]
    return max(scored, key=lambda c: (c.metrics[SCORE], -c.step)).step if scored else None


class Checkpoints:
    """The checkpoints in a folder; a context manager that finishes writing at its end."""

    def __init__(self, folder: Path, *, keep_last: int | None = None):
        """Opens the folder.

        Args:
          keep_last: number of newest checkpoints that a save keeps besides the best one. None opens for reading only.
        """
        self._writable = keep_last is not None
        if self._writable:
            # Orbax removes these in the background, while the same steps may be written again.
            if hosts.is_main():
                for path in folder.glob(UNFINISHED):
                    shutil.rmtree(path)
            hosts.wait_for_all("unfinished checkpoints")
        self._orbax = ocp.training.Checkpointer(
            folder.absolute(),
            preservation_policy=_KeepBestAndLast(keep_last) if self._writable else None,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._orbax.close()

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in increasing order."""
        return [checkpoint.step for checkpoint in self._orbax.checkpoints]

    @property
    def latest(self) -> int | None:
        """The newest step, or None."""
        return self.steps[-1] if self.steps else None

    @property
    def best(self) -> int | None:
        """The step of the highest score, the earliest of equals; None if none has a score."""
        return _best(self._orbax.checkpoints)

    def save(
        self, step: int, arrays: Mapping[str, Any], note: Mapping[str, Any], *, score: float | None = None
    ) -> None:
        """Starts writing a checkpoint once any earlier one is written.

        Args:
          arrays: JAX or NumPy arrays by name. They must be neither changed nor donated until the checkpoint is written.
          score: validation score, higher is better; None or a number that is not finite is never the best.
        """
        if not self._writable:
            raise ValueError("these checkpoints were opened for reading; give keep_last to write")
        metrics = None if score is None or not math.isfinite(score) else {SCORE: score}
        content = {STATE: dict(arrays), NOTE: json.dumps(note)}
        self._orbax.save_async(step, content, metrics=metrics, force=True)

    def shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the arrays of a step by name, without reading the arrays.

        Raises:
          ValueError: if there is no checkpoint of that step, or it is of a version with other content.
        """
        if step not in self.steps:
            raise ValueError(f"there is no checkpoint of step {step}; there are {self.steps or 'none'}")
        content = self._orbax.metadata(step).metadata
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
        """Returns the arrays and the note of a step.

        Args:
          like: shapes, dtypes and shardings by name; every process reads only what its devices hold. None for NumPy arrays.

        Raises:
          ValueError: if there is no checkpoint of that step, or it cannot be read (see `shapes`).
        """
        names = self.shapes(step)
        if like is None:
            content = self._orbax.load(step)
            content[STATE] = {name: np.asarray(array) for name, array in content[STATE].items()}
        else:
            content = self._orbax.load(step, {STATE: {name: like[name] for name in names}, NOTE: ""})
        return content[STATE], json.loads(content[NOTE])

    def wait(self) -> None:
        """Returns when all checkpoints are on disk; raises any error of writing."""
        self._orbax.wait()
