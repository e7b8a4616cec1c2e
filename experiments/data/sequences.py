"""Sequences of tokens with one label each, in memory: the source of pipelines."""

import itertools
from collections.abc import Iterable, Iterator

import numpy as np


class Sequences:
    """Labelled sequences of token ids, stored contiguously in one array.

    Attributes:
      tokens: all tokens, of any integer type; sequence i is `tokens[offsets[i] : offsets[i + 1]]`.
      offsets: start of each sequence and end of the last, int64 (n + 1,).
      labels: label of each sequence, int32 (n,).
      lengths: number of tokens of each sequence, int64 (n,).
    """

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray, labels: np.ndarray):
        """Creates the sequences after checking that the arrays are consistent.

        Raises:
          TypeError: if the tokens are not integers.
          ValueError: if the offsets do not divide `tokens` into one sequence of at least one token per label.
        """
        self.tokens = np.array(tokens)
        if not np.issubdtype(self.tokens.dtype, np.integer):
            raise TypeError(f"tokens must be integers, got {self.tokens.dtype}")
        self.offsets = np.array(offsets, np.int64)
        self.labels = np.array(labels, np.int32)
        self.lengths = np.diff(self.offsets)
        if len(self.offsets) != len(self.labels) + 1:
            raise ValueError(
                f"{len(self.labels)} labels need as many offsets plus one, got {len(self.offsets)}"
            )
        if self.offsets[0] != 0 or self.offsets[-1] != len(self.tokens):
            raise ValueError(
                f"offsets must run from 0 to the number of tokens, {len(self.tokens)}; "
                f"they run from {self.offsets[0]} to {self.offsets[-1]}"
            )
        if np.any(self.lengths < 1):
            raise ValueError(f"sequence {int(np.argmin(self.lengths))} has no tokens")
        for array in (self.tokens, self.offsets, self.labels, self.lengths):
            array.setflags(write=False)

    @classmethod
    def from_records(cls, records: Iterable[tuple[bytes, int]], dtype: str = "uint8") -> "Sequences":
        """Returns sequences from pairs of token ids, stored as `dtype`, and label."""
        records = list(records)
        item = np.dtype(dtype).itemsize
        offsets = np.cumsum([0] + [len(tokens) // item for tokens, _ in records])
        tokens = np.frombuffer(b"".join(tokens for tokens, _ in records), dtype)
        return cls(tokens, offsets, np.array([label for _, label in records], np.int32))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]], int(self.labels[index])

    def taken(self, order: np.ndarray) -> "Sequences":
        """Returns some of the sequences, in an order."""
        lengths = self.lengths[order]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        places = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][order] - offsets[:-1], lengths)
        return Sequences(self.tokens[places], offsets, self.labels[order])

    def records(self) -> Iterator[tuple[memoryview, int]]:
        """Yields pairs of token ids, as stored bytes, and label."""
        stored = memoryview(self.tokens).cast("B")
        bounds = (self.offsets * self.tokens.itemsize).tolist()
        for (start, stop), label in zip(itertools.pairwise(bounds), self.labels.tolist(), strict=True):
            yield stored[start:stop], label

    def gather(self, indices: np.ndarray, width: int) -> dict[str, np.ndarray]:
        """Returns the sequences at `indices`, padded at the end with zeros.

        Returns:
          inputs (b, width), segment_ids (b, width; 1 for tokens, 0 for padding) and labels (b,), all int32.

        Raises:
          ValueError: if a sequence is longer than `width`.
        """
        lengths = self.lengths[indices]
        if lengths.max() > width:
            raise ValueError(f"a sequence of {lengths.max()} tokens does not fit into a width of {width}")
        inputs = np.zeros((len(indices), width), np.int32)
        for row, start, length in zip(inputs, self.offsets[indices].tolist(), lengths.tolist(), strict=True):
            row[:length] = self.tokens[start : start + length]
        segment_ids = (np.arange(width) < lengths[:, None]).astype(np.int32)
        return {"inputs": inputs, "segment_ids": segment_ids, "labels": self.labels[indices]}
