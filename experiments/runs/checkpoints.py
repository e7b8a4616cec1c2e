"""Checkpoints of a run: the only file that knows Orbax.

A checkpoint is a folder named by its step, written in the background under a temporary name and renamed when it is
complete, so that whatever carries its step's name is whole. It holds a tree of arrays, stored by the names of layers,
and a note: all else that training needs to go on, as JSON.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orbax.checkpoint import v1 as ocp

SCORE = "score"
UNFINISHED = "*.orbax-checkpoint-tmp*"


class _KeepBestAndLast:
    """Orbax's policy of preservation: the best score (the earliest of equals) and the newest few."""

    def __init__(self, last: int):
        self._last = last

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        kept = {checkpoint.step for checkpoint in checkpoints[-self._last :]} | {_best(checkpoints)}
        return [checkpoint.step in kept for checkpoint in checkpoints]


def _best(checkpoints: Sequence[Any]) -> int | None:
    scored = [c for c in checkpoints if c.metrics]
    return max(scored, key=lambda c: (c.metrics[SCORE], -c.step)).step if scored else None


class Checkpoints:
    """The checkpoints in a folder; a context that finishes writing at its end."""

    def __init__(self, folder: Path, *, keep_last: int | None = None):
        """Opens the folder.

        Args:
          keep_last: newest checkpoints that a save leaves beside the best one. None opens for reading only.
        """
        self._writable = keep_last is not None
        if (
            self._writable
        ):  # Orbax would remove these in the background, while the same steps may be written again
            for path in folder.glob(UNFINISHED):
                shutil.rmtree(path)
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
        """Steps that have a checkpoint, increasing."""
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
        """Starts writing a checkpoint, after any that is still being written.

        Args:
          arrays: a tree of NumPy arrays, which must not change any more.
          score: of the validation, higher is better; None or a number that is not finite never counts as the best.
        """
        if not self._writable:
            raise ValueError("these checkpoints were opened for reading; give keep_last to write")
        metrics = None if score is None or not math.isfinite(score) else {SCORE: score}
        content = {"arrays": dict(arrays), "note": json.dumps(note)}
        self._orbax.save_async(step, content, metrics=metrics, force=True)

    def load(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arrays and the note of a step.

        Raises:
          ValueError: if there is no checkpoint of that step.
        """
        if step not in self.steps:
            raise ValueError(f"there is no checkpoint of step {step}; there are {self.steps or 'none'}")
        content = self._orbax.load(step)
        return content["arrays"], json.loads(content["note"])

    def wait(self) -> None:
        """Returns when all checkpoints are on disk; raises what went wrong in writing."""
        self._orbax.wait()
