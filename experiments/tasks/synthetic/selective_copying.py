"""Selective copying: data tokens scattered among noise, to be written down in order at the end."""

from typing import Annotated

import numpy as np

from experiments.tasks.synthetic.draws import Draws
from experiments.tasks.synthetic.rows import Arrays
from experiments.tasks.synthetic.task import SyntheticTask, length_splits
from experiments.tasks.tokens import IGNORE
from layers.options import Bound, Count, checked_dataclass


@checked_dataclass(kw_only=True, eq=False)
class SelectiveCopying(SyntheticTask):
    """Selective copying (Gu and Dao 2024, arXiv:2312.00752; the form of S4's code).

        0 5 0 0 2 0 7 0 | M M M      labels below the markers M: 5 2 7

    `tokens` data tokens, uniform over 1 .. V - 2, stand at distinct random places of `length + tokens`; all other places
    hold noise, token 0. As many markers V - 1 follow, whose labels are the data tokens. The defaults are the paper's.

    Attributes:
      vocab_size: V, number of tokens, noise and marker included.
      length: number of noise tokens.
      tokens: number of tokens to remember.
      extrapolate: other lengths, each with a split "length_N".
    """

    vocab_size: Annotated[int, Bound(least=4)] = 16
    length: Count = 4096
    tokens: int = 16
    extrapolate: tuple[int, ...] = ()
    train: int = 1_000_000
    validation: int = 256
    test: int = 1024

    @property
    def further_splits(self) -> tuple[str, ...]:
        return tuple(length_splits(self.extrapolate))

    def width(self, split: str) -> int:
        return length_splits(self.extrapolate).get(split, self.length) + 2 * self.tokens

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 2)

    def make(self, draws: Draws, split: str) -> Arrays:
        count, memory = self.width(split), self.width(split) - self.tokens
        data = draws.integers(1, self.vocab_size - 1, self.tokens)
        places = np.sort(draws.distinct(memory, self.tokens), axis=1)
        inputs = np.zeros((len(draws), count), np.int64)
        labels = np.full_like(inputs, IGNORE)
        np.put_along_axis(inputs, places, data, axis=1)
        inputs[:, memory:], labels[:, memory:] = self.vocab_size - 1, data
        return {"inputs": inputs, "labels": labels}
