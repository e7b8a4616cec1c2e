"""The other tasks of MAD: selective copying, compression and memorization."""

from typing import Annotated

import numpy as np

from experiments.tasks.synthetic.draws import Draws
from experiments.tasks.synthetic.rows import Arrays
from experiments.tasks.synthetic.task import SyntheticTask
from experiments.tasks.tokens import IGNORE
from layers.options import Bound, check_integer, checked_dataclass


@checked_dataclass(kw_only=True, eq=False)
class MADSelectiveCopying(SyntheticTask):
    """MAD's selective copying (Poli et al. 2024, arXiv:2403.17844).

        5 _ _ 2 _ 7 C _ _ _      labels at the last blanks: 5 2 7

    Data tokens are uniform over 0 .. V - 3; the blank is V - 2 and the sign to copy C is V - 1. Every blank among the
    data stands before a random data token, so that the last one is right before C, as in the authors' code.

    Attributes:
      vocab_size: V, number of tokens.
      length: T, tokens per row.
      tokens: number of tokens to copy.
    """

    vocab_size: Annotated[int, Bound(least=4)] = 16
    length: int = 256
    tokens: int = 16
    train: int = 12_800
    validation: int = 1280
    test: int = 1280

    def __post_init__(self) -> None:
        check_integer("length", self.length, least=2 * self.tokens + 1)

    def width(self, split: str) -> int:
        return self.length

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 2)

    def make(self, draws: Draws, split: str) -> Arrays:
        blank, blanks = self.vocab_size - 2, self.length - 2 * self.tokens - 1
        data = draws.integers(0, blank, self.tokens)
        # Data token j is at j plus the number of blanks before it or an earlier one.
        before = draws.integers(0, self.tokens, blanks)
        places = [j + np.sum(before <= j, axis=1) for j in range(self.tokens)]
        inputs = np.full((len(draws), self.length), blank)
        labels = np.full_like(inputs, IGNORE)
        np.put_along_axis(inputs, np.stack(places, axis=1), data, axis=1)
        inputs[:, -self.tokens - 1] = blank + 1
        labels[:, -self.tokens :] = data
        return {"inputs": inputs, "labels": labels}


@checked_dataclass(kw_only=True, eq=False)
class Compression(SyntheticTask):
    """MAD's compression, one vector must hold a random sequence (Poli et al. 2024, arXiv:2403.17844).

    T - 1 random tokens below V - 1, then the token V - 1. The label at each position is its input, so this task is for
    models that decode all of them from the last vector: `kind="autoencoder"`.

    Attributes:
      vocab_size: V, number of tokens.
      length: T, tokens per row.
    """

    vocab_size: Annotated[int, Bound(least=3)] = 16
    length: Annotated[int, Bound(least=2)] = 32
    train: int = 12_800
    validation: int = 1280
    test: int = 1280

    def width(self, split: str) -> int:
        return self.length

    @property
    def chance(self) -> float:
        return (1 + (self.length - 1) / (self.vocab_size - 1)) / self.length

    def make(self, draws: Draws, split: str) -> Arrays:
        inputs = draws.integers(0, self.vocab_size - 1, self.length)
        inputs[:, -1] = self.vocab_size - 1
        return {"inputs": inputs, "labels": inputs}


@checked_dataclass(kw_only=True, eq=False)
class Memorization(SyntheticTask):
    """MAD's memorization, learn a fixed dictionary (Poli et al. 2024, arXiv:2403.17844).

        k5 ? k2 ? ...      labels at the signs ?: the values of k5, k2

    The map from keys, the first half of the V - 1 symbols, to values, the second, depends on the seed and is the same in
    all splits; the sequence does not contain it. The sign ? is V - 1.

    Attributes:
      vocab_size: V, number of tokens.
      length: T, tokens per row, even.
    """

    vocab_size: Annotated[int, Bound(least=5)] = 256
    length: int = 32
    train: int = 256
    validation: int = 1280
    test: int = 1280

    def __post_init__(self) -> None:
        if self.length < 2 or self.length % 2:
            raise ValueError(f"length={self.length}; expected an even number")

    def width(self, split: str) -> int:
        return self.length

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 1 - (self.vocab_size - 1) // 2)

    @property
    def value_of(self) -> np.ndarray:
        """The value of each key, (keys,)."""
        half = (self.vocab_size - 1) // 2
        draws = Draws((type(self).__name__, self.seed, "dictionary"), np.array([0]))
        return half + draws.distinct(self.vocab_size - 1 - half, half)[0]

    def make(self, draws: Draws, split: str) -> Arrays:
        keys = draws.integers(0, (self.vocab_size - 1) // 2, self.length // 2)
        inputs = np.full((len(draws), self.length), self.vocab_size - 1)
        labels = np.full_like(inputs, IGNORE)
        inputs[:, ::2], labels[:, 1::2] = keys, self.value_of[keys]
        return {"inputs": inputs, "labels": labels}
