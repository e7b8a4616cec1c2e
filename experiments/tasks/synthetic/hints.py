"""Addition with index hints and sorting with an auxiliary task: hints that help models generalize to longer inputs."""

import numpy as np

from experiments.tasks.synthetic.algorithms import Addition, Sorting, flipped
from experiments.tasks.synthetic.draws import Draws
from experiments.tasks.synthetic.rows import Arrays, joined, next_tokens
from layers.options import UnitInterval, checked_dataclass


@checked_dataclass(kw_only=True, eq=False)
class HintedAddition(Addition):
    """Addition with a letter before every digit, as in b5 c3 + b8 = b3 c4 end (Zhou et al. 2024, arXiv:2402.09371).

    Digits of equal significance have the same letter. The letters of an example follow each other from a random one on, so that
    those of long examples are seen in short ones. They have the ids from 13 on, and are part of the answer.

    Attributes:
      letters: number of letters; the longest sum needs one more than the longest number has digits.
    """

    letters: int = 102

    def __post_init__(self) -> None:
        super().__post_init__()
        needed = max(self.lengths[1], *self.extrapolate, 0) + 1
        if self.letters < needed:
            raise ValueError(
                f"letters={self.letters} with sums of up to {needed} digits; expected at least {needed}"
            )

    @property
    def vocab_size(self) -> int:
        return 13 + self.letters

    def width(self, split: str) -> int:
        return 6 * self.range_of(split)[1] + 4

    def make(self, draws: Draws, split: str) -> Arrays:
        digits, lengths = self.numbers(draws, split)
        start = draws.integers(0, self.letters + 1 - lengths.max(axis=1, keepdims=True), 1)
        letters = 13 + start + np.arange(digits.shape[-1])
        parts = []
        signs = (np.full((len(draws), 1), 10 + i) for i in range(3))
        for place, sign in enumerate(signs):
            pair = [letters, digits[:, place]]
            if not self.reverse:
                pair = [flipped(row, lengths[:, place]) for row in pair]
            parts += [(np.stack(pair, axis=-1).reshape(len(draws), -1), 2 * lengths[:, place]), (sign, 1)]
        return next_tokens(*joined(parts, self.width(split) + 1), first=2 * lengths[:, :2].sum(axis=1) + 2)


@checked_dataclass(kw_only=True, eq=False)
class HintedSorting(Sorting):
    """Sorting, and in a share of the training examples the next larger element of the string (Awasthi and Gupta 2023, arXiv:2310.00726).

    A first token says which of the two is asked for, "sort" or "next". The auxiliary task is: next x1 ... xn x = y end, where x is an
    element of the string and y the smallest that is larger; there is no y if x is the largest. Validation and all
    other splits only sort.

    Attributes:
      hinted: share of the training examples with the auxiliary task.
    """

    hinted: UnitInterval = 0.5

    @property
    def vocab_size(self) -> int:
        return self.symbols + 4

    def width(self, split: str) -> int:
        return 2 * self.range_of(split)[1] + 3

    def make(self, draws: Draws, split: str) -> Arrays:
        lengths = self.draw_lengths(draws, split)
        given = self.draw(draws, self.range_of(split)[1])
        share = self.hinted if split == "train" else 0.0
        asks = (draws.uniform(1) < share)[:, 0]
        asked = np.take_along_axis(given, draws.integers(0, lengths[:, None], 1), axis=1)
        ordered = self.answer(given, lengths)
        larger = np.sum(ordered <= asked, axis=1)[:, None]  # place of the smallest larger one
        found = np.take_along_axis(ordered, np.minimum(larger, ordered.shape[1] - 1), axis=1)
        answer = np.where(asks[:, None], found, ordered)
        answered = np.where(asks, larger[:, 0] < lengths, lengths)
        sign, end, sort = (np.full((len(draws), 1), self.symbols + i) for i in range(3))
        task = np.where(asks[:, None], sort + 1, sort)
        parts = [(task, 1), (given, lengths), (asked, asks), (sign, 1), (answer, answered), (end, 1)]
        return next_tokens(*joined(parts, self.width(split) + 1), first=lengths + asks + 2)
