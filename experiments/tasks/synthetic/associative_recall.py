"""Associative recall: keys followed by their values, then one key whose value is asked for."""

from typing import Annotated

import numpy as np

from experiments.tasks.synthetic.draws import Draws
from experiments.tasks.synthetic.rows import Arrays
from experiments.tasks.synthetic.task import SyntheticTask, length_splits
from experiments.tasks.tokens import IGNORE
from layers.options import Bound, checked_dataclass


@checked_dataclass(kw_only=True, eq=False)
class AssociativeRecall(SyntheticTask):
    """Associative recall with one query (Ba et al. 2016, arXiv:1610.06258; as in H3, Fu et al. 2023, arXiv:2212.14052).

        k3 v3 k1 v1 k3 v3 ... => k1      label at the last position: v1

    Keys are uniform over the first half of the symbols, values over the second, drawn once per key and sequence, so that
    a key always has the same value. The query is one of the keys that occurred. In training every next token is a label,
    as in the authors' code, so the loss stays far above zero; in the other splits only the answer is.

    Attributes:
      vocab_size: V, number of symbols and the two tokens "=>" (V - 2) and "." (V - 1, never used by this form).
      length: number of tokens of all pairs, even.
      answers_only: whether training, too, has only the answer as label.
      extrapolate: other lengths, each with a split "length_N".
    """

    vocab_size: Annotated[int, Bound(least=6)] = 20
    length: int = 40
    answers_only: bool = False
    extrapolate: tuple[int, ...] = ()
    train: int = 5000
    validation: int = 500
    test: int = 500

    def __post_init__(self) -> None:
        for length in (self.length, *self.extrapolate):
            if length < 2 or length % 2:
                raise ValueError(f"length={length}; expected an even number: keys and values in turn")

    @property
    def further_splits(self) -> tuple[str, ...]:
        return tuple(length_splits(self.extrapolate))

    def width(self, split: str) -> int:
        return length_splits(self.extrapolate).get(split, self.length) + 2

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 2 - (self.vocab_size - 2) // 2)

    def make(self, draws: Draws, split: str) -> Arrays:
        symbols, length = self.vocab_size - 2, self.width(split) - 2
        half = symbols // 2
        value_of = draws.integers(half, symbols, half)
        keys = draws.integers(0, half, length // 2)
        query = random_member(draws, keys, half)
        text = np.zeros((len(draws), length + 3), np.int64)
        text[:, 0:length:2] = keys
        text[:, 1:length:2] = np.take_along_axis(value_of, keys, axis=1)
        text[:, length], text[:, length + 1 : length + 2] = symbols, query
        text[:, length + 2 :] = np.take_along_axis(value_of, query, axis=1)
        labels = text[:, 1:].copy()
        if split != "train" or self.answers_only:
            labels[:, :-1] = IGNORE
        return {"inputs": text[:, :-1], "labels": labels}


def random_member(
    draws: Draws, items: np.ndarray, count: int, allowed: np.ndarray | None = None
) -> np.ndarray:
    """Returns one of the distinct numbers below `count` in each row of `items`, uniformly: (b, 1).

    Args:
      items: numbers, int (b, n).
      allowed: whether each of them counts, bool (b, n); None for all.
    """
    present = np.zeros((len(items), count + 1), bool)
    items = items if allowed is None else np.where(allowed, items, count)
    np.put_along_axis(present, items, True, axis=1)
    return np.argmax(np.where(present[:, :count], draws.uniform(count), -1), axis=1)[:, None]
