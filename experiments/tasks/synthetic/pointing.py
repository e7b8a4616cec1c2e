"""Tasks whose answers are items of the input, for pointer networks: sorting numbers, and convex hulls of points.

The answer y_1 ... y_k names items of the source, counted from 1, and is predicted from 0 y_1 ... y_k and the source; 0 ends it. Lengths
and splits are those of `Algorithm`.
"""

import abc
from typing import ClassVar

import numpy as np

from experiments.tasks.synthetic.algorithms import Algorithm
from experiments.tasks.synthetic.draws import Draws
from experiments.tasks.synthetic.rows import Arrays
from experiments.tasks.tokens import IGNORE
from layers.options import checked_dataclass


@checked_dataclass(kw_only=True, eq=False)
class Pointing(Algorithm):
    """The base class: sources of uniform numbers in [0, 1), `input_size` per item, and `answer`."""

    has_source: ClassVar[bool] = True
    names_items: ClassVar[bool] = True

    lengths: tuple[int, int] = (5, 10)
    extrapolate: tuple[int, ...] = (10, 15, 20)

    @abc.abstractmethod
    def answer(self, given: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the items of the answers, from 0 on (b, n), and their number (b,), for items (b, n, c) of which `lengths` exist."""

    def width(self, split: str) -> int:
        return self.range_of(split)[1] + 1

    @property
    def chance(self) -> float:
        return 1 / (self.lengths[1] + 1)

    def make(self, draws: Draws, split: str) -> Arrays:
        lengths, most = self.draw_lengths(draws, split), self.range_of(split)[1]
        places = np.arange(most + 1)
        source = np.zeros((len(draws), most + 1, self.input_size))
        source[:, :most] = draws.uniform(most, self.input_size)
        source[places >= lengths[:, None]] = 0
        items, count = self.answer(source[:, :most], lengths)
        named = places[:most] < count[:, None]
        labels = np.full((len(draws), most + 1), IGNORE)
        labels[:, :most][named] = items[named] + 1
        np.put_along_axis(labels, count[:, None], 0, axis=1)
        inputs = np.zeros(source.shape)
        inputs[:, 1:, 0] = np.maximum(labels[:, :-1], 0)
        ids = {"source_ids": places < lengths[:, None], "target_ids": places <= count[:, None]}
        return {
            "inputs": inputs,
            "labels": labels,
            "source": source,
            "lengths": np.maximum(lengths, count + 1),
        } | ids


@checked_dataclass(kw_only=True, eq=False)
class PointerSorting(Pointing):
    """The items of a set of numbers in ascending order (Vinyals et al. 2016, arXiv:1511.06391)."""

    input_size: ClassVar[int] = 1

    def answer(self, given: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        real = np.arange(given.shape[1]) < lengths[:, None]
        return np.argsort(np.where(real, given[..., 0], np.inf), axis=1, kind="stable"), lengths


@checked_dataclass(kw_only=True, eq=False)
class ConvexHull(Pointing):
    """The corners of the convex hull of points of a square, counter-clockwise from the first (Vinyals et al. 2015, arXiv:1506.03134)."""

    input_size: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.lengths[0], *self.extrapolate, np.inf) < 3:
            raise ValueError(
                f"lengths={self.lengths} and extrapolate={self.extrapolate}; expected at least 3 points, which have a hull"
            )

    def answer(self, given: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows, most = given.shape[:2]
        real = np.arange(most) < lengths[:, None]
        following = np.full((rows, most), -1)
        for i in range(most):
            for j in range(most):
                if i == j:
                    continue
                # An edge of the hull has every other point on its left.
                edge, others = given[:, j] - given[:, i], given - given[:, i : i + 1]
                left = edge[:, :1] * others[..., 1] - edge[:, 1:] * others[..., 0] > 0
                left[:, [i, j]] = True
                found = (left | ~real).all(1) & real[:, i] & real[:, j]
                following[found, i] = j
        count = (following >= 0).sum(1)
        items = np.zeros((rows, most), np.int64)
        items[:, 0] = np.argmax(following >= 0, axis=1)
        for step in range(1, most):
            items[:, step] = np.take_along_axis(following, items[:, step - 1 : step], axis=1)[:, 0]
        return items, count
