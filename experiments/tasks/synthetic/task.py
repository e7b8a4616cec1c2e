"""The base class of synthetic tasks: splits from seeds, masked cross-entropy, a manifest and the accuracy of guessing."""

import abc
import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any, ClassVar

from experiments.tasks import tokens
from experiments.tasks.synthetic.draws import Draws
from experiments.tasks.synthetic.rows import Arrays, PairRows, Rows
from experiments.tasks.task import Task
from layers.kernels.segments import Padding
from layers.options import Count, check_integer, checked_dataclass
from layers.typing import Array, Float

# Increment when a generator makes other rows from the same options.
VERSION = 1


@checked_dataclass(kw_only=True, eq=False)
class SyntheticTask(Task, abc.ABC):
    """A task whose rows depend only on its options; nothing is made before rows are gathered.

    A subclass defines `make(draws, split)` (see `Rows`), `width(split)`, `vocab_size` and `chance`.

    Attributes:
      seed: seed of all draws.
      train, validation, test: number of sequences per split; further splits have as many as the test split.
    """

    makes_no_data: ClassVar[bool] = True
    padding: ClassVar[Padding] = "end"
    packed: ClassVar[bool] = False
    ragged: ClassVar[bool] = False
    input_size: ClassVar[int | None] = None

    seed: Count = 0
    train: int
    validation: int
    test: int

    @abc.abstractmethod
    def make(self, draws: Draws, split: str) -> Arrays:
        """Returns the arrays of the rows that the draws belong to."""

    @abc.abstractmethod
    def width(self, split: str) -> int:
        """Returns the number of tokens of the longest row of a split."""

    @property
    @abc.abstractmethod
    def chance(self) -> float:
        """Accuracy of guessing among the tokens that can be answers."""

    @property
    def further_splits(self) -> tuple[str, ...]:
        """Names of splits besides "train", "validation" and "test"; "length_512" has another length."""
        return ()

    @functools.cached_property
    def splits(self) -> dict[str, Rows]:
        """All splits by name."""
        counts = {"train": self.train, "validation": self.validation, "test": self.test}
        counts |= dict.fromkeys(self.further_splits, self.test)
        return {
            split: (PairRows if self.has_source else Rows)(
                functools.partial(self.make, split=split),
                (type(self).__name__, VERSION, self.seed, split),
                count=count,
                width=self.width(split),
                ragged=self.ragged,
                features=self.input_size or 1,
            )
            for split, count in counts.items()
        }

    @property
    def manifest(self) -> dict[str, Any]:
        """The parameters of the data."""
        parameters = json.loads(
            json.dumps(dataclasses.asdict(self))
        )  # tuples become lists, as when read from JSON
        return {"name": type(self).__name__, "version": VERSION, "parameters": parameters}

    def loss(
        self, outputs: Float[Array, "b t v"], batch: Mapping[str, Array]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the mean loss over labels and the sums of `tokens.cross_entropy`."""
        return tokens.cross_entropy(outputs, batch)

    def baselines(self, split: str = "test") -> dict[str, float]:
        """Returns the accuracy of guessing."""
        return {"chance": self.chance}


def length_splits(lengths: tuple[int, ...]) -> dict[str, int]:
    """Returns splits for rows of other lengths: their names, such as "length_512", and the lengths.

    Raises:
      TypeError, ValueError: if a length is not a positive integer.
    """
    for length in lengths:
        check_integer("extrapolate", length, least=1)
    return {f"length_{length}": length for length in lengths}
