"""The word problem of a finite group: the product of all elements so far, which asks for a state that is tracked."""

import functools
import itertools
import re

import numpy as np

from experiments.tasks.synthetic.algorithms import Algorithm
from experiments.tasks.synthetic.draws import Draws
from experiments.tasks.synthetic.rows import Arrays
from experiments.tasks.tokens import IGNORE
from layers.options import checked_dataclass

KINDS = {"Z": "cyclic", "S": "symmetric", "A": "alternating"}
BOUNDS = {"Z": (2, 1000), "S": (2, 6), "A": (3, 6)}


@checked_dataclass(kw_only=True, eq=False)
class WordProblem(Algorithm):
    """Products of elements of a group (Merrill et al. 2024, arXiv:2404.08819; Grazzi et al. 2025, arXiv:2411.12537).

        g1  g2     g3       ...     labels: g1, g2 g1, g3 g2 g1, ...

    Elements are uniform, and every token has a label. The word problem of S5 is complete for NC1, so that no fixed number of layers of
    attention or of diagonal recurrences solves it at every length unless TC0 is NC1; those of Z60 and S4 are easier.

    Attributes:
      group: Z and a number, the integers under addition modulo it; S or A and a number, all or the even permutations of as many
        elements. Permutations have ids by their lexicographic order.
      moved: the inputs are the permutations that move at most this many elements, such as the identity and all swaps for 2; None for
        all.
    """

    group: str = "S5"
    moved: int | None = None
    lengths: tuple[int, int] = (3, 40)
    extrapolate: tuple[int, ...] = (40, 64, 128, 256)

    def __post_init__(self) -> None:
        super().__post_init__()
        kind, number = _kind(self.group)
        if self.moved is None:
            return
        if kind == "cyclic":
            raise ValueError(f"moved={self.moved} with group={self.group!r}; it is for permutations, S or A")
        least = 2 if kind == "symmetric" else 3
        if not least <= self.moved <= number:
            raise ValueError(
                f"moved={self.moved}; expected a number from {least} to {number}, or None for all of {self.group}"
            )

    @property
    def vocab_size(self) -> int:
        return len(products(self.group))

    def width(self, split: str) -> int:
        return self.range_of(split)[1]

    @property
    def chance(self) -> float:
        return 1 / self.vocab_size

    def make(self, draws: Draws, split: str) -> Arrays:
        lengths = self.draw_lengths(draws, split)
        given = inputs(self.group, self.moved)
        words = given[draws.integers(0, len(given), self.width(split))]
        table, labels = products(self.group), words.copy()
        for place in range(1, words.shape[1]):
            labels[:, place] = table[words[:, place], labels[:, place - 1]]
        inside = np.arange(words.shape[1]) < lengths[:, None]
        return {
            "inputs": np.where(inside, words, 0),
            "labels": np.where(inside, labels, IGNORE),
            "lengths": lengths,
        }


@functools.cache
def products(group: str) -> np.ndarray:
    """Returns the table of a group: entry (a, b) is the id of a b, which as a permutation first does b and then a."""
    kind, number = _kind(group)
    if kind == "cyclic":
        return np.add.outer(np.arange(number), np.arange(number)) % number
    elements = _permutations(kind, number)
    ids = np.full(number**number, -1, np.int64)
    places = number ** np.arange(number)
    ids[elements @ places] = np.arange(len(elements))
    # First b and then a sends i to a[b[i]].
    return ids[elements[:, elements] @ places]


@functools.cache
def inputs(group: str, moved: int | None) -> np.ndarray:
    """Returns the ids of the elements that move at most `moved` places, or of all."""
    kind, number = _kind(group)
    if moved is None:
        return np.arange(len(products(group)))
    elements = _permutations(kind, number)
    return np.flatnonzero((elements != np.arange(number)).sum(axis=1) <= moved)


def _permutations(kind: str, number: int) -> np.ndarray:
    found = np.array(list(itertools.permutations(range(number))))
    if kind == "symmetric":
        return found
    first, second = np.triu_indices(number, 1)
    inversions = (found[:, first] > found[:, second]).sum(axis=1)
    return found[inversions % 2 == 0]


def _kind(group: str) -> tuple[str, int]:
    """Returns what a group consists of and its number.

    Raises:
      ValueError: if the text names none that is small enough.
    """
    if match := re.fullmatch(r"([ZSA])([1-9]\d*)", group):
        letter, number = match[1], int(match[2])
        least, most = BOUNDS[letter]
        if least <= number <= most:
            return KINDS[letter], number
    said = ", ".join(f"{letter}{least} to {letter}{most}" for letter, (least, most) in BOUNDS.items())
    raise ValueError(f"group={group!r}; expected one of {said}")
