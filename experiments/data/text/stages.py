"""Stages of training on longer and longer rows, as in Shortformer (Press et al. 2021, arXiv:2012.15832).

The documents are cut into rows of each length. A stage takes batches of its length for a number of steps, the last stage those
of the full length to the end. Optimizer, schedule of the learning rate and positions per batch go on unchanged.
"""

import bisect
import functools
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.data.bucketing import Plan, count_train_batches, plan_epoch
from experiments.data.pipeline import Batch
from experiments.data.schedules import Choice, Scheduled
from experiments.data.text.packing import Packed
from layers.options import check_integer

Stages = Sequence[tuple[int, int]]


def check_stages(stages: Stages, length: int) -> tuple[tuple[int, int], ...]:
    """Returns the stages as integers.

    Args:
      stages: length of the rows and number of steps of each stage before the last.
      length: length of the rows of the last stage.

    Raises:
      ValueError, TypeError: a stage is not two integers, or the lengths do not increase up to `length` and divide it.
    """
    checked, before = [], 0
    for stage in stages:
        if not isinstance(stage, list | tuple) or len(stage) != 2:
            raise ValueError(f"stages has {stage!r}; expected pairs (length of rows, number of steps)")
        for name, value in zip(("length", "steps"), stage, strict=True):
            check_integer(f"{name} of the stage {tuple(stage)}", value, least=1)
        if not before < stage[0] < length or length % stage[0]:
            raise ValueError(
                f"stages={tuple(map(tuple, stages))} with length={length}; expected lengths that increase, are less than "
                f"{length} and divide it"
            )
        before = stage[0]
        checked.append((int(stage[0]), int(stage[1])))
    return tuple(checked)


class Staged(Scheduled):
    """Rows of several lengths of one split.

    Outside training it is the rows of the full length.

    Attributes:
      lengths: number of tokens of each row of the full length.
      segments: largest number of segments of a row of any length.
    """

    def __init__(self, parts: Mapping[int, Packed], stages: Stages):
        """Creates the source.

        Args:
          parts: the rows by their length, increasing.
          stages: see `check_stages`; without the last stage, which is that of the longest rows.
        """
        self._parts, self._stages = dict(parts), tuple(stages)
        self.widths = tuple(self._parts)
        self._full = self._parts[self.widths[-1]]
        self.lengths = self._full.lengths
        self.segments = max(part.segments for part in self._parts.values())

    def __len__(self) -> int:
        return len(self._full)

    def gather(self, indices: np.ndarray, width: int) -> Batch:
        """Returns rows of the stage whose width this is, or else full ones; see `Packed.gather`."""
        return self._parts.get(width, self._full).gather(indices, width)

    def label_counts(self, vocab_size: int) -> np.ndarray:
        """Returns how often each token is a label of the full rows."""
        return self._full.label_counts(vocab_size)

    def example(self, width: int) -> int:
        return int(np.argmin(self._parts[width].lengths))

    def train_batches(self, batch_size: int) -> int:
        """Returns the number of batches of an epoch of full rows."""
        for width, part in self._parts.items():
            if (rows := self.rows(batch_size, width)) > len(part):
                raise ValueError(
                    f"a batch of {rows} rows of {width} tokens is larger than the data set, which has {len(part)} such rows; "
                    "use a smaller batch_size"
                )
        return count_train_batches(len(self), batch_size)

    def schedule(self, *, batch_size: int, seed: int) -> Choice:
        @functools.lru_cache(maxsize=2)
        def plan(width: int, epoch: int) -> Plan:
            lengths, rows = self._parts[width].lengths, self.rows(batch_size, width)
            return plan_epoch(lengths, batch_size=rows, bucket_bounds=None, seed=seed, epoch=epoch)

        starts = [0, *itertools.accumulate(steps for _, steps in self._stages)]

        def choose(step: int) -> tuple[np.ndarray, int]:
            stage = bisect.bisect_right(starts, step) - 1
            width = self.widths[stage]
            per_epoch = len(self._parts[width]) // self.rows(batch_size, width)
            epoch, number = divmod(step - starts[stage], per_epoch)
            return plan(width, epoch).indices[number], width

        return choose
