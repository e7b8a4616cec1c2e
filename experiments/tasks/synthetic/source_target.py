"""Copying and sorting from a source to a target, for encoder-decoders: the tasks of `algorithms` with the input apart.

The target x_1 ... x_n end is predicted from "=" x_1 ... x_n and the source. Lengths and splits are those of `Algorithm`.
"""

from typing import ClassVar

import numpy as np

from experiments.tasks.synthetic.algorithms import Copy, Sorting
from experiments.tasks.synthetic.draws import Draws
from experiments.tasks.synthetic.rows import Arrays, joined, next_tokens
from layers.options import checked_dataclass


@checked_dataclass(kw_only=True, eq=False)
class SourceCopy(Copy):
    """Copying a source string to the target (Jelassi et al. 2024, arXiv:2402.01032, with an encoder)."""

    has_source: ClassVar[bool] = True

    def width(self, split: str) -> int:
        return self.range_of(split)[1] + 1

    def make(self, draws: Draws, split: str) -> Arrays:
        lengths = self.draw_lengths(draws, split)
        given = self.draw(draws, self.range_of(split)[1])
        sign, end = (np.full((len(draws), 1), self.symbols + i) for i in range(2))
        parts = [(sign, 1), (self.answer(given, lengths), lengths), (end, 1)]
        target = next_tokens(*joined(parts, self.width(split) + 1), first=1)
        source, _ = joined([(given, lengths)], self.width(split))
        places = np.arange(self.width(split))
        ids = {"source_ids": places < lengths[:, None], "target_ids": places < target["lengths"][:, None]}
        return target | {"source": source} | ids


@checked_dataclass(kw_only=True, eq=False)
class SourceSorting(SourceCopy, Sorting):
    """Sorting a source string to the target (Vinyals et al. 2016, arXiv:1511.06391, who sort numbers)."""

    # Of the two bases, `SourceCopy` would give its own.
    symbols: int = Sorting.symbols
