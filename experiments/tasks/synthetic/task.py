"""The base class of synthetic tasks: splits from seeds, masked cross-entropy, a manifest, the score of guessing."""

import abc
import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any, ClassVar

from experiments.config.loading import check_integer
from experiments.tasks import tokens
from experiments.tasks.synthetic.draws import Draws
from experiments.tasks.synthetic.rows import Arrays, Rows
from experiments.tasks.task import Task
from layers.kernels.segments import Padding
from layers.typing import Array, Float

# Raise when a generator makes other rows of the same options.
VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SyntheticTask(Task, abc.ABC):
    """A task whose rows follow from its options; nothing is made before rows are gathered.

    A task of this kind gives `make(draws, split)` (see `Rows`), `width(split)`, `vocab_size` and `chance`.

    Attributes:
      seed: of all draws.
      train, validation, test: sequences of each split; further splits have as many as the test.
    """

    makes_no_data: ClassVar[bool] = True
    padding: ClassVar[Padding] = "end"
    packed: ClassVar[bool] = False
    ragged: ClassVar[bool] = False

    seed: int = 0
    train: int
    validation: int
    test: int

    def __post_init__(self) -> None:
        check_integer("seed", self.seed, least=0)
        for size in ("train", "validation", "test"):
            check_integer(size, getattr(self, size), least=1)

    @abc.abstractmethod
    def make(self, draws: Draws, split: str) -> Arrays:
        """The arrays of the rows that the draws belong to."""

    @abc.abstractmethod
    def width(self, split: str) -> int:
        """Tokens of the longest row of a split."""

    @property
    @abc.abstractmethod
    def chance(self) -> float:
        """Accuracy of guessing among the tokens that can be answers."""

    @property
    def further_splits(self) -> tuple[str, ...]:
        """Names of splits beside "train", "validation" and "test"; "length_512" holds rows of another length."""
        return ()

    @functools.cached_property
    def splits(self) -> dict[str, Rows]:
        """All splits by name."""
        counts = {"train": self.train, "validation": self.validation, "test": self.test}
        counts |= dict.fromkeys(self.further_splits, self.test)
        return {
            split: Rows(
                functools.partial(self.make, split=split),
                (type(self).__name__, VERSION, self.seed, split),
                count=count,
                width=self.width(split),
                ragged=self.ragged,
            )
            for split, count in counts.items()
        }

    @property
    def manifest(self) -> dict[str, Any]:
        """What the data are made from."""
        parameters = json.loads(
            json.dumps(dataclasses.asdict(self))
        )  # tuples become lists, as when read back
        return {"name": type(self).__name__, "version": VERSION, "parameters": parameters}

    def loss(
        self, outputs: Float[Array, "b t v"], batch: Mapping[str, Array]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Mean loss over labels and the sums of `tokens.cross_entropy`."""
        return tokens.cross_entropy(outputs, batch)

    def baselines(self, split: str = "test") -> dict[str, float]:
        """The accuracy of guessing."""
        return {"chance": self.chance}


def length_splits(lengths: tuple[int, ...]) -> dict[str, int]:
    """Splits for rows of other lengths: their names, such as "length_512", and the lengths.

    Raises:
      TypeError, ValueError: if a length is no positive integer.
    """
    for length in lengths:
        check_integer("extrapolate", length, least=1)
    return {f"length_{length}": length for length in lengths}
