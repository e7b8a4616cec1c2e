"""Sources that choose the rows of training batches themselves, in batches of few widths and of one number of positions."""

import abc
from collections.abc import Callable

import numpy as np

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
