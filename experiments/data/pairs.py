"""Pairs of sequences with one label each, in memory: the source of pipelines."""

import numpy as np

from experiments.data.sequences import Sequences


class Pairs:
    """Labelled pairs of sequences of token ids.

    Attributes:
      stored: the sequences, the two of a pair one after the other, each with the label of the pair.
      labels: label of each pair, int32 (n,).
      lengths: number of tokens of the longer sequence of each pair, int64 (n,).
    """

    def __init__(self, stored: Sequences):
        """Creates the source.

        Raises:
          ValueError: if the number of sequences is odd, or two of a pair have different labels.
        """
        if len(stored) % 2 or np.any(stored.labels[::2] != stored.labels[1::2]):
            raise ValueError(f"{len(stored)} sequences are no pairs with one label each")
        self.stored, self.labels = stored, stored.labels[::2]
        self.lengths = stored.lengths.reshape(-1, 2).max(axis=1)

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, indices: np.ndarray, width: int) -> dict[str, np.ndarray]:
        """Returns the pairs at `indices`, padded at the end with zeros.

        Returns:
          inputs (b, 2, width), segment_ids (b, 2, width; 1 for tokens, 0 for padding) and labels (b,), all int32.

        Raises:
          ValueError: if a sequence is longer than `width`.
        """
        rows = (2 * np.asarray(indices)[:, None] + np.arange(2)).ravel()
        batch = self.stored.gather(rows, width)
        pairs = {name: batch[name].reshape(-1, 2, width) for name in ("inputs", "segment_ids")}
        return pairs | {"labels": batch["labels"][::2]}
