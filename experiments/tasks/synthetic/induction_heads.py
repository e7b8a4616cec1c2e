"""Induction heads: recall what followed a special token."""

from typing import Annotated

import numpy as np

from experiments.tasks.synthetic.draws import Draws
from experiments.tasks.synthetic.rows import Arrays
from experiments.tasks.synthetic.task import SyntheticTask, length_splits
from experiments.tasks.tokens import IGNORE
from layers.options import Bound, checked_dataclass


@checked_dataclass(kw_only=True, eq=False)
class InductionHeads(SyntheticTask):
    """Induction heads (Olsson et al. 2022, arXiv:2209.11895; with lengths as in Gu and Dao 2024, arXiv:2312.00752).

        3 1 V 6 2 ... 4 V      label at the last position: 6

    Tokens are uniform over 0 .. V - 1. The special token V stands at one random place before the last two and again at
    the end, where the label is the token that followed it. Training uses `length` = 256, evaluation lengths of 2^6 to
    2^14; `extrapolate=(2**20,)` makes a split "length_1048576".

    Attributes:
      symbols: V, number of ordinary tokens.
      length: tokens per sequence, both special tokens included.
      extrapolate: other lengths, each with a split "length_N".
    """

    symbols: Annotated[int, Bound(least=2)] = 16
    length: Annotated[int, Bound(least=3)] = 256
    extrapolate: tuple[Annotated[int, Bound(least=3)], ...] = tuple(2**n for n in range(6, 15))
    train: int = 1_000_000
    validation: int = 512
    test: int = 512

    @property
    def vocab_size(self) -> int:
        """Number of symbols and the special token."""
        return self.symbols + 1

    @property
    def further_splits(self) -> tuple[str, ...]:
        return tuple(length_splits(self.extrapolate))

    def width(self, split: str) -> int:
        return length_splits(self.extrapolate).get(split, self.length)

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    def make(self, draws: Draws, split: str) -> Arrays:
        length = self.width(split)
        place = draws.integers(0, length - 2, 1)
        inputs = draws.integers(0, self.symbols, length)
        np.put_along_axis(inputs, place, self.symbols, axis=1)
        inputs[:, -1] = self.symbols
        labels = np.full_like(inputs, IGNORE)
        labels[:, -1:] = np.take_along_axis(inputs, place + 1, axis=1)
        return {"inputs": inputs, "labels": labels}
