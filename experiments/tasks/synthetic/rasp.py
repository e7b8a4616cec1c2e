"""Counting, the most frequent symbol, and copying of distinct symbols: tasks with short programs in RASP-L.

Zhou et al. 2024 (arXiv:2310.16028) conjecture that Transformers generalize to longer inputs on tasks that a short program of RASP-L
solves for every length. These are three of theirs, beside `sorting`; `copy`, `parity` and `addition` have no such program.
"""

import numpy as np

from experiments.tasks.synthetic.algorithms import Algorithm, Copy
from experiments.tasks.synthetic.draws import Draws
from experiments.tasks.synthetic.rows import Arrays, joined, next_tokens
from layers.options import checked_dataclass


@checked_dataclass(kw_only=True, eq=False)
class UniqueCopy(Copy):
    """Copying a string of distinct symbols, as in x1 ... xn = x1 ... xn end (Zhou et al. 2024, arXiv:2310.16028).

    A symbol then has one place, so that the token before tells which one is next.
    """

    symbols: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        longest = max(self.lengths[1], *self.extrapolate, 0)
        if self.symbols < longest:
            raise ValueError(
                f"symbols={self.symbols} with strings of {longest} distinct symbols; expected at least {longest}"
            )

    def draw(self, draws: Draws, length: int) -> np.ndarray:
        return draws.distinct(self.symbols, length)


@checked_dataclass(kw_only=True, eq=False)
class Counting(Algorithm):
    """Counting from one number to another, as in 7 10 = 7 8 9 10 end (Zhou et al. 2024, arXiv:2310.16028).

    A number is one token, and the length is how many are counted. The first is uniform among those that leave room.

    Attributes:
      numbers: numbers from 0 to numbers - 1, whose ids they are; "=" and the end are the next two ids.
    """

    numbers: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        longest = max(self.lengths[1], *self.extrapolate, 0)
        if self.numbers < longest:
            raise ValueError(f"numbers={self.numbers} with {longest} to count; expected at least {longest}")

    @property
    def vocab_size(self) -> int:
        return self.numbers + 2

    def width(self, split: str) -> int:
        return self.range_of(split)[1] + 3

    @property
    def chance(self) -> float:
        return 1 / self.numbers

    def make(self, draws: Draws, split: str) -> Arrays:
        lengths = self.draw_lengths(draws, split)[:, None]
        first = draws.integers(0, self.numbers + 1 - lengths, 1)
        counted = first + np.arange(self.range_of(split)[1])
        sign, end = (np.full((len(draws), 1), self.numbers + i) for i in range(2))
        parts = [(first, 1), (first + lengths - 1, 1), (sign, 1), (counted, lengths[:, 0]), (end, 1)]
        return next_tokens(*joined(parts, self.width(split) + 1), first=3)


@checked_dataclass(kw_only=True, eq=False)
class Mode(Algorithm):
    """The symbol that is most frequent in a string, as in b a b c = b end (Zhou et al. 2024, arXiv:2310.16028).

    The symbols of a string are uniform among a few, which are drawn for it. Of several most frequent ones the smallest takes
    a place of the next, so that one is alone.

    Attributes:
      symbols: number of symbols, with ids 0 .. symbols - 1; "=" and the end are the next two ids.
      drawn: number of symbols that a string may have.
    """

    symbols: int = 52
    drawn: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drawn > self.symbols:
            raise ValueError(f"drawn={self.drawn} of symbols={self.symbols}; expected at most {self.symbols}")

    @property
    def vocab_size(self) -> int:
        return self.symbols + 2

    def width(self, split: str) -> int:
        return self.range_of(split)[1] + 2

    @property
    def chance(self) -> float:
        return 1 / self.drawn

    def make(self, draws: Draws, split: str) -> Arrays:
        lengths, width = self.draw_lengths(draws, split), self.range_of(split)[1]
        among = np.sort(draws.distinct(self.symbols, self.drawn), axis=1)
        places = draws.integers(0, self.drawn, width)  # in `among`
        inside = np.arange(width) < lengths[:, None]
        counts = np.stack([np.sum((places == k) & inside, axis=1) for k in range(self.drawn)], axis=1)
        most = counts == counts.max(axis=1, keepdims=True)
        mode = np.argmax(most, axis=1)[:, None]
        other = np.argmax(most & (np.arange(self.drawn) != mode), axis=1)[:, None]
        tied = np.sum(most, axis=1) > 1
        given_up = np.argmax((places == other) & inside, axis=1)
        rows = np.flatnonzero(tied)
        places[rows, given_up[rows]] = mode[rows, 0]
        given, answer = (np.take_along_axis(among, at, axis=1) for at in (places, mode))
        sign, end = (np.full((len(draws), 1), self.symbols + i) for i in range(2))
        parts = [(given, lengths), (sign, 1), (answer, 1), (end, 1)]
        return next_tokens(*joined(parts, width + 3), first=lengths + 1)
