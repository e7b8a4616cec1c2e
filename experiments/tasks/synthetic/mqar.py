"""Multi-query associative recall: pairs of keys and values, then the keys again; answer with their values."""

import numpy as np

from experiments.tasks.synthetic.draws import Draws
from experiments.tasks.synthetic.rows import Arrays
from experiments.tasks.synthetic.task import SyntheticTask
from experiments.tasks.tokens import IGNORE
from layers.options import Positive, check_integer, checked_dataclass


@checked_dataclass(kw_only=True, eq=False)
class MQAR(SyntheticTask):
    """Multi-query associative recall (Arora et al. 2024, arXiv:2312.04927).

        k1 v1 ... kD vD 0 0 k2 0 k1 0 0 ...      labels: v2 at k2, v1 at k1

    Keys are D distinct tokens of 1 .. V/2 - 1, values D distinct ones of V/2 .. V - 1. The keys are repeated at D
    distinct even places of the tail: place i of the S = (T - 2D)/2 is drawn with probability proportional to i^(power -
    1), in sequence, and the j-th drawn holds the j-th key, as in the authors' generator. Early places are likely
    and drawn early, so the order of the queries reveals part of the order of the pairs; `shuffle_queries` removes this.
    The defaults are the smallest setting of the paper's Figure 2.

    Attributes:
      vocab_size: V, number of tokens.
      length: T, tokens per row, even.
      pairs: D, number of pairs, at most T/4.
      power: power of the distribution of places; 1 is uniform.
      random_filler: whether tokens of the whole vocabulary replace 0 between the queries.
      shuffle_queries: whether the keys are assigned to the drawn places in random order.
      extrapolate: pairs (T, D), each with a split "length_T_pairs_D".
    """

    vocab_size: int = 8192
    length: int = 64
    pairs: int = 4
    power: Positive = 0.01
    random_filler: bool = False
    shuffle_queries: bool = False
    extrapolate: tuple[tuple[int, int], ...] = ()
    train: int = 100_000
    validation: int = 1000
    test: int = 3000

    def __post_init__(self) -> None:
        for length, pairs in ((self.length, self.pairs), *self.extrapolate):
            check_integer("length", length, least=4)
            if length % 2 or not 1 <= pairs <= length // 4:
                raise ValueError(
                    f"length={length} with pairs={pairs}; the length must be even and 4 pairs or more"
                )
            if self.vocab_size // 2 - 1 < pairs:
                raise ValueError(
                    f"vocab_size={self.vocab_size} has not {pairs} keys; expected at least {2 * pairs + 2}"
                )

    @property
    def _settings(self) -> dict[str, tuple[int, int]]:
        return {f"length_{length}_pairs_{pairs}": (length, pairs) for length, pairs in self.extrapolate}

    @property
    def further_splits(self) -> tuple[str, ...]:
        return tuple(self._settings)

    def _setting(self, split: str) -> tuple[int, int]:
        return self._settings.get(split, (self.length, self.pairs))

    def width(self, split: str) -> int:
        return self._setting(split)[0]

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - self.vocab_size // 2)

    def make(self, draws: Draws, split: str) -> Arrays:
        length, pairs = self._setting(split)
        half = self.vocab_size // 2
        keys = 1 + draws.distinct(half - 1, pairs)
        values = half + draws.distinct(self.vocab_size - half, pairs)
        weights = np.arange(1.0, (length - 2 * pairs) // 2 + 1) ** (self.power - 1)
        slots = draws.weighted(weights, pairs)
        if self.shuffle_queries:
            slots = np.take_along_axis(slots, draws.order(pairs), axis=1)
        inputs = np.zeros((len(draws), length), np.int64)
        labels = np.full_like(inputs, IGNORE)
        inputs[:, 0 : 2 * pairs : 2], inputs[:, 1 : 2 * pairs : 2] = keys, values
        places = 2 * pairs + 2 * slots
        np.put_along_axis(inputs, places, keys, axis=1)
        np.put_along_axis(labels, places, values, axis=1)
        if self.random_filler:
            inputs = np.where(inputs == 0, draws.integers(0, self.vocab_size, length), inputs)
        return {"inputs": inputs, "labels": labels}
