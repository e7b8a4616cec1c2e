"""Dataset decomposition (Pouransari et al. 2024, arXiv:2405.13226): rows of single documents, by powers of two.

A document with n predictions left gives a row of 2^k tokens, k = floor(log2 n), and so on with the rest, as long as a row has at
least `shortest` tokens; what is left then is dropped. If n exceeds the longest row, k is drawn with a chance proportional
to 2^-k, so that all lengths get the same number of tokens of it. No row crosses a document, and none has padding.

A batch has rows of one length. An epoch consists of cycles, each with an equal part of the batches of every length. Within a
cycle, the length of the next batch is drawn with a chance proportional to the batches that are left of it times its odds in the
curriculum: with "grow_p2" each length is half as likely as the next shorter one, with "grow_linear" the odds fall by equal
steps to 1, and with "uniform" they are equal.
"""

import bisect
import functools
import itertools
from typing import Any

import numpy as np

from experiments.data.bucketing import check_batch_size, shuffled, uniforms
from experiments.data.pipeline import IGNORE, Batch
from experiments.data.schedules import Choice, Scheduled
from experiments.data.sequences import Sequences
from experiments.data.text.packing import Packed

CURRICULA = ("grow_p2", "grow_linear", "uniform")
LENGTHS = 6  # number of lengths by default
CUTS, BATCHES, ROWS = 0, 1, 2  # what is drawn


class Decomposed(Packed, Scheduled):
    """Rows of single documents, whose numbers of tokens are powers of two.

    Attributes:
      dropped: number of predictions of the documents that no row has.
    """

    segments = 1

    def __init__(
        self,
        documents: Sequences,
        end: int,
        *,
        length: int,
        shortest: int | None = None,
        curriculum: str = "grow_p2",
        cycles: int = 8,
        most: int | None = None,
    ):
        """Cuts the documents.

        Args:
          length: number of tokens of the longest rows, a power of two.
          shortest: number of tokens of the shortest rows, a power of two; by default length / 32, at least 1.
          curriculum: one of `CURRICULA`.
          cycles: number of cycles of an epoch.

        Raises:
          ValueError: a length is no power of two, there is no such curriculum, or no document gives a row.
        """
        super().__init__(documents, end, length=length, most=most)
        shortest = max(1, length >> (LENGTHS - 1)) if shortest is None else shortest
        for name, value in dict(length=length, shortest=shortest).items():
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name}={value} with packing='decompose'; expected a power of two")
        if shortest > length:
            raise ValueError(f"shortest={shortest} is longer than length={length}")
        if curriculum not in CURRICULA:
            raise ValueError(f"curriculum={curriculum!r}; expected one of {', '.join(CURRICULA)}")
        first, sizes = _cut(documents.lengths, self._starts, shortest, length)
        if not (sizes == length).any():
            raise ValueError(
                f"length={length} with packing='decompose', but no document gives a row of so many tokens; the longest "
                f"predicts {documents.lengths.max()}"
            )
        self.dropped = int(documents.lengths.sum() - sizes.sum())
        kept = self._kept(len(sizes))
        self._first, self.lengths = first[kept], sizes[kept]
        self.widths = tuple(np.unique(self.lengths).tolist())
        self._cycles = cycles
        ranks = np.arange(len(self.widths))[::-1]
        self._odds = {"grow_p2": 2.0**ranks, "grow_linear": ranks + 1.0, "uniform": np.ones(len(ranks))}[
            curriculum
        ]

    def gather(self, indices: np.ndarray, width: int) -> Batch:
        """Returns inputs and labels, and segment_ids if the width is that of the longest rows, which others are padded to.

        Raises:
          ValueError: if a row is longer than `width`, or shorter than a width that is not the largest.
        """
        lengths = self.lengths[indices][:, None]
        if lengths.max() > width or (width < self.length and lengths.min() < width):
            raise ValueError(
                f"rows of {lengths.min()} to {lengths.max()} tokens do not fit into a width of {width}"
            )
        columns = np.arange(width)
        real, places = columns < lengths, self._first[indices][:, None] + np.minimum(columns, lengths - 1)
        arrays = {
            "inputs": np.where(real, self._text[places], 0).astype(np.int32),
            "labels": np.where(real, self._text[places + 1].astype(np.int32), IGNORE),
        }
        return arrays if width < self.length else arrays | {"segment_ids": real.astype(np.int32)}

    def summary(self) -> dict[str, Any]:
        """Returns the number of rows of each length, and of the predictions that no row has, as JSON."""
        rows = {str(width): int((self.lengths == width).sum()) for width in self.widths}
        return dict(rows=rows, dropped=self.dropped)

    def example(self, width: int) -> int:
        return int(np.argmax(self.lengths == width))

    def train_batches(self, batch_size: int) -> int:
        """Returns the number of batches of an epoch."""
        return sum(self._batches(batch_size))

    def _batches(self, batch_size: int) -> list[int]:
        """Returns the number of batches of each width."""
        check_batch_size(batch_size)
        counts = [int((self.lengths == width).sum()) // self.rows(batch_size, width) for width in self.widths]
        if not any(counts):
            raise ValueError(
                f"batch_size={batch_size}: no length of packing='decompose' has rows for a batch of {batch_size} x "
                f"{self.widths[-1]} tokens; use a smaller one"
            )
        return counts

    def schedule(self, *, batch_size: int, seed: int) -> Choice:
        counts = self._batches(batch_size)
        per_epoch = sum(counts)

        @functools.lru_cache(maxsize=2)
        def plan(epoch: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
            order = self._order(counts, seed, epoch)
            numbers = np.zeros(per_epoch, np.int64)
            rows = []
            for rank, (width, count) in enumerate(zip(self.widths, counts, strict=True)):
                numbers[order == rank] = np.arange(count)
                own = np.flatnonzero(self.lengths == width)
                mixed = own[shuffled(len(own), seed, epoch, ROWS, rank)]
                rows.append(mixed[: count * self.rows(batch_size, width)].reshape(count, -1))
            return order, numbers, rows

        def choose(step: int) -> tuple[np.ndarray, int]:
            epoch, place = divmod(step, per_epoch)
            order, numbers, rows = plan(epoch)
            rank = int(order[place])
            return rows[rank][numbers[place]], self.widths[rank]

        return choose

    def _order(self, counts: list[int], seed: int, epoch: int) -> np.ndarray:
        """Returns the rank among the widths of every batch of an epoch."""
        chances, order = uniforms(sum(counts), seed, epoch, BATCHES), []
        whole = np.array(counts)
        for cycle in range(self._cycles):
            left = (cycle + 1) * whole // self._cycles - cycle * whole // self._cycles
            while left.any():
                bounds = np.cumsum(left * self._odds)
                rank = int(np.searchsorted(bounds, chances[len(order)] * bounds[-1], "right"))
                left[rank] -= 1
                order.append(rank)
        return np.array(order)


def _cut(
    lengths: np.ndarray, starts: np.ndarray, shortest: int, longest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first tokens and the sizes of the rows of documents.

    Args:
      lengths: number of predictions of each document.
      starts: first token of each document.
    """
    sizes = [shortest << k for k in range((longest // shortest).bit_length())]
    bounds = list(itertools.accumulate(1 / size for size in sizes))
    draws = np.random.Philox(np.random.SeedSequence([CUTS]))
    first, rows = [], []
    for start, left in zip(starts.tolist(), lengths.tolist(), strict=False):
        while left >= shortest:
            size = 1 << (left.bit_length() - 1)
            if size > longest:
                chance = (draws.random_raw() >> 11) * 2.0**-53
                size = sizes[bisect.bisect_right(bounds, chance * bounds[-1])]
            first.append(start)
            rows.append(size)
            start, left = start + size, left - size
    return np.array(first, np.int64), np.array(rows, np.int64)
