"""Segmented sequences: rows of training that are pieces of longer stretches of text, at their places in it (Karypis et al. 2024, arXiv:2310.14633).

Of a stretch of T tokens a row has L, in n pieces of L / n. The stretch is cut into T n / L pieces of this length, of which n are drawn without
replacement, all equally likely, so that over many rows each position is read equally often. With S the places that are drawn,

    loss = -sum_{p in S} log P(x_{p+1} | x_q at place q, for q in S, q <= p) / L

Attention then meets distances of up to T at the cost of L tokens. The token behind a piece is predicted too. The abstract speaks of
sub-sampled segments at their original positions; number, length and draw of the pieces are our reading. What they gain is in
experiments/results/segmented_sequences.
"""

import numpy as np

from experiments.data.pipeline import IGNORE, Batch
from experiments.data.schedules import Passes
from experiments.data.text.packing import Packed


class Pieces(Passes):
    """Pieces of stretches of text; a source of `pipeline`.

    Attributes:
      length: number of tokens of a row.
      extent: number of tokens of a stretch.
      segments: 1, as the pieces of a row see each other.
    """

    segments = 1

    def __init__(self, stretches: Packed, *, length: int, pieces: int):
        """Creates the rows.

        Args:
          stretches: rows of `stretches.length` tokens.
          length: number of tokens of a row.
          pieces: number of pieces of a row.
        """
        self._stretches, self._pieces = stretches, pieces
        self.length, self.extent = length, stretches.length
        self.lengths = np.full(len(stretches), length, np.int64)
        self.widths = (length,)

    def gather(self, indices: np.ndarray, width: int) -> Batch:
        """Returns inputs, labels and positions, and segment_ids if the width needs padding.

        Args:
          indices: numbers of stretches, plus `len(self)` for each earlier pass, which has draws of its own.

        Raises:
          ValueError: if a row is longer than `width`.
        """
        if self.length > width:
            raise ValueError(f"a row of {self.length} tokens does not fit into a width of {width}")
        indices = np.asarray(indices)
        whole = self._stretches.gather(indices % len(self), self.extent)
        size = self.length // self._pieces
        drawn = np.stack([self._drawn(index, self.extent // size) for index in indices.tolist()])
        places = (drawn[..., None] * size + np.arange(size)).reshape(len(indices), -1)
        arrays = {name: np.take_along_axis(whole[name], places, axis=1) for name in ("inputs", "labels")}
        arrays["positions"] = places.astype(np.int32)
        if width > self.length:
            arrays["segment_ids"] = np.ones_like(arrays["inputs"])
        missing = ((0, 0), (0, width - self.length))
        return {
            name: np.pad(array, missing, constant_values=IGNORE * (name == "labels"))
            for name, array in arrays.items()
        }

    def _drawn(self, index: int, count: int) -> np.ndarray:
        """Returns the numbers of the pieces of a row, in order."""
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(index)))
        return np.sort(rng.permutation(count)[: self._pieces])

    def label_counts(self, vocab_size: int) -> np.ndarray:
        """Returns how often each token is a label of the stretches."""
        return self._stretches.label_counts(vocab_size)
