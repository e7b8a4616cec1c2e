"""Copy, parity, sorting and addition, trained on short examples and evaluated on longer ones.

Models trained on lengths up to some bound rarely generalize to longer inputs (Kazemnejad et al. 2023,
arXiv:2305.19466; Zhou et al. 2024, arXiv:2310.16028). Training, "validation" and "test" have lengths uniform in
`lengths`; each length in `extrapolate` has its own split "length_N", which shares no example with training if it is
longer. `sequence_accuracy` is the fraction of answers without a mistake, given the earlier tokens of the answer.
"""

import numpy as np

from experiments.tasks.synthetic.draws import Draws
from experiments.tasks.synthetic.rows import Arrays, joined, next_tokens
from experiments.tasks.synthetic.task import SyntheticTask, length_splits
from experiments.tasks.tokens import IGNORE
from layers.options import checked_dataclass


@checked_dataclass(kw_only=True, eq=False)
class Algorithm(SyntheticTask):
    """The base class of tasks with inputs of different lengths.

    Attributes:
      lengths: lengths of the shortest and the longest training input, inclusive.
      extrapolate: further lengths, each with a split "length_N".
    """

    ragged = True

    lengths: tuple[int, int] = (1, 20)
    extrapolate: tuple[int, ...] = (20, 30, 40)
    train: int = 100_000
    validation: int = 1000
    test: int = 1000

    def __post_init__(self) -> None:
        if self.lengths[0] > self.lengths[1]:
            raise ValueError(f"lengths={self.lengths}; expected the shortest and the longest, at least 1")

    @property
    def further_splits(self) -> tuple[str, ...]:
        return tuple(length_splits(self.extrapolate))

    def range_of(self, split: str) -> tuple[int, int]:
        """Returns the lengths of the shortest and the longest input of a split."""
        length = length_splits(self.extrapolate).get(split)
        return self.lengths if length is None else (length, length)

    def draw_lengths(self, draws: Draws, split: str) -> np.ndarray:
        """Returns uniform lengths (b,)."""
        low, high = self.range_of(split)
        return draws.integers(low, high + 1, 1)[:, 0]


@checked_dataclass(kw_only=True, eq=False)
class Copy(Algorithm):
    """Copying a string, as in x1 ... xn = x1 ... xn end (Jelassi et al. 2024, arXiv:2402.01032).

    Attributes:
      symbols: number of symbols of the strings, with ids 0 .. symbols - 1; "=" and the end are the next two ids.
    """

    symbols: int = 26

    @property
    def vocab_size(self) -> int:
        return self.symbols + 2

    def width(self, split: str) -> int:
        return 2 * self.range_of(split)[1] + 1

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    def answer(self, given: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Returns the answer to strings (b, n) of lengths (b,), which has the same lengths."""
        return given

    def draw(self, draws: Draws, length: int) -> np.ndarray:
        """Returns strings (b, length)."""
        return draws.integers(0, self.symbols, length)

    def make(self, draws: Draws, split: str) -> Arrays:
        lengths = self.draw_lengths(draws, split)
        given = self.draw(draws, self.range_of(split)[1])
        sign, end = (np.full((len(draws), 1), self.symbols + i) for i in range(2))
        parts = [(given, lengths), (sign, 1), (self.answer(given, lengths), lengths), (end, 1)]
        return next_tokens(*joined(parts, self.width(split) + 1), first=lengths + 1)


@checked_dataclass(kw_only=True, eq=False)
class Sorting(Copy):
    """Sorting a string with repetitions, as in 3 1 3 = 1 3 3 end (Kazemnejad et al. 2023, arXiv:2305.19466)."""

    symbols: int = 50

    def answer(self, given: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        inside = np.arange(given.shape[1]) < lengths[:, None]
        return np.sort(np.where(inside, given, self.symbols), axis=1)


@checked_dataclass(kw_only=True, eq=False)
class Parity(Algorithm):
    """Parity of bits, asked for at the last of them (Grazzi et al. 2025, arXiv:2411.12537).

    The label is 1 if the number of ones is odd. A linear recurrence needs an eigenvalue of -1 for it.

    Attributes:
      running: whether every bit has a label, the parity so far: the scratchpad of Anil et al. 2022 (arXiv:2207.04901).
    """

    running: bool = False
    lengths: tuple[int, int] = (3, 40)
    extrapolate: tuple[int, ...] = (40, 64, 128, 256)

    vocab_size = 2

    def width(self, split: str) -> int:
        return self.range_of(split)[1]

    @property
    def chance(self) -> float:
        return 0.5

    def make(self, draws: Draws, split: str) -> Arrays:
        lengths = self.draw_lengths(draws, split)
        places = np.arange(self.width(split))
        bits = draws.integers(0, 2, len(places)) * (places < lengths[:, None])
        last = lengths[:, None] - 1
        labelled = places <= last if self.running else places == last
        return {
            "inputs": bits,
            "labels": np.where(labelled, np.cumsum(bits, axis=1) % 2, IGNORE),
            "lengths": lengths,
        }


@checked_dataclass(kw_only=True, eq=False)
class Addition(Algorithm):
    """Adding two numbers digit by digit, as in 35 + 8 = 43 end (Zhou et al. 2024, arXiv:2402.09371).

    The numbers of digits are uniform and independent, and so are the digits, without leading zeros (except the one-digit
    number 0). In "length_N" one of the numbers has N digits and the other at most N. Digits are ids 0 .. 9, "+" 10, "="
    11 and the end 12.

    Attributes:
      reverse: whether all three numbers start with the least significant digit.
    """

    reverse: bool = True
    lengths: tuple[int, int] = (1, 10)
    extrapolate: tuple[int, ...] = (10, 12, 15, 20)

    vocab_size = 13

    def width(self, split: str) -> int:
        return 3 * self.range_of(split)[1] + 3

    @property
    def chance(self) -> float:
        return 0.1

    def numbers(self, draws: Draws, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the digits of both numbers and of their sum, least significant first (b, 3, n), and their numbers of digits (b, 3)."""
        _, high = self.range_of(split)
        lengths = np.stack([self.draw_lengths(draws, split) for _ in range(2)], axis=1)
        if split in self.further_splits:
            shorter = draws.integers(0, 2, 1)
            np.put_along_axis(lengths, shorter, draws.integers(1, high + 1, 1), axis=1)
        places = np.arange(high + 1)
        digits = draws.integers(0, 10, 2, high + 1)  # least significant first
        leading = (places == lengths[..., None] - 1) & (lengths[..., None] > 1)
        digits = np.where(leading, draws.integers(1, 10, 2, 1), digits) * (places < lengths[..., None])
        total, carry = np.zeros((len(draws), high + 1), np.int64), np.zeros(len(draws), np.int64)
        for place in places:
            carry, total[:, place] = np.divmod(digits[:, :, place].sum(axis=1) + carry, 10)
        longest = lengths.max(axis=1)
        answer_length = longest + np.take_along_axis(total, longest[:, None], axis=1)[:, 0]
        return np.concatenate([digits, total[:, None]], 1), np.concatenate(
            [lengths, answer_length[:, None]], 1
        )

    def make(self, draws: Draws, split: str) -> Arrays:
        digits, lengths = self.numbers(draws, split)
        plus, equals, end = (np.full((len(draws), 1), 10 + i) for i in range(3))
        numbers = [(digits[:, i], lengths[:, i]) for i in range(3)]
        if not self.reverse:
            numbers = [(flipped(number, length), length) for number, length in numbers]
        parts = [numbers[0], (plus, 1), numbers[1], (equals, 1), numbers[2], (end, 1)]
        return next_tokens(*joined(parts, self.width(split) + 1), first=lengths[:, :2].sum(axis=1) + 2)


def flipped(digits: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns the first digits of each row, reversed."""
    return np.take_along_axis(
        digits, (lengths[:, None] - 1 - np.arange(digits.shape[1])) % digits.shape[1], axis=1
    )
