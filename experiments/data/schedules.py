"""Sources that choose the rows of training batches themselves, in batches of few widths and of one number of positions."""

import abc
import functools
from collections.abc import Callable

import numpy as np

from experiments.data.bucketing import Plan, count_train_batches, plan_epoch

# Returns the indices and the width of the rows of a step.
Choice = Callable[[int], tuple[np.ndarray, int]]


class Scheduled(abc.ABC):
    """A source of `pipeline` whose training batches follow a schedule.

    A batch of width w has `rows(batch_size, w)` rows, so that all batches have batch_size * max(widths) positions. The batch
    of a step is computed from the number of the step. Outside training it is a source as others are, whose rows are
    padded to the largest width.

    Attributes:
      widths: widths of training batches, increasing; each divides the last.
    """

    widths: tuple[int, ...]

    def rows(self, batch_size: int, width: int) -> int:
        """Returns the number of rows of a batch of a width, where a batch of the largest width has `batch_size`."""
        return batch_size * self.widths[-1] // width

    @abc.abstractmethod
    def example(self, width: int) -> int:
        """Returns the index of a row of a width."""

    @abc.abstractmethod
    def train_batches(self, batch_size: int) -> int:
        """Returns the number of batches of an epoch.

        Raises:
          ValueError: if a batch is larger than the data set.
        """

    @abc.abstractmethod
    def schedule(self, *, batch_size: int, seed: int) -> Choice:
        """Returns a function from steps to the rows of their batches."""


class Passes(Scheduled):
    """A source of rows of one width that differ between passes over the split.

    Training batches have the indices of `bucketing.plan_epoch` plus `len(self)` for each earlier pass.

    Attributes:
      lengths: number of tokens of each row.
    """

    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def example(self, width: int) -> int:
        return int(np.argmin(self.lengths))

    def train_batches(self, batch_size: int) -> int:
        return count_train_batches(len(self), batch_size)

    def schedule(self, *, batch_size: int, seed: int) -> Choice:
        per_epoch = self.train_batches(batch_size)

        @functools.lru_cache(maxsize=2)
        def plan(epoch: int) -> Plan:
            return plan_epoch(self.lengths, batch_size=batch_size, bucket_bounds=None, seed=seed, epoch=epoch)

        def choose(step: int) -> tuple[np.ndarray, int]:
            epoch, number = divmod(step, per_epoch)
            return plan(epoch).indices[number] + epoch * len(self), self.widths[0]

        return choose
