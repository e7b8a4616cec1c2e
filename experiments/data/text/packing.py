"""Rows of tokens from documents: joined and cut, or whole pieces fitted together.

"concatenate" joins all documents, each with an end token after it, and cuts every `length` tokens. The last row begins
earlier, so that it is whole, and predicts only what the row before it does not. With `reset`, documents of a row are
segments, and an end token does not predict what follows it.

"best_fit" cuts every document into pieces of at most `length` tokens and packs pieces into as few rows as best-fit
decreasing finds: the longest piece goes first, into the row with the least space that takes it (Ding et al. 2024,
arXiv:2404.10830). Only documents longer than a row are cut, and padding stands only at the ends of rows.

In both a label is the next token of the same document or its end token, which is therefore predicted.
"""

import abc

import numpy as np

from experiments.data.pipeline import IGNORE, Batch
from experiments.data.sequences import Sequences

PACKINGS = ("concatenate", "best_fit")
AT_ONCE = 2**22  # number of tokens that are counted in one call


class Packed(abc.ABC):
    """A split whose rows are made of documents; a source of `pipeline`.

    Attributes:
      length: number of tokens of a full row.
      lengths: number of tokens of each row, int64 (n,).
      segments: largest number of segments of a row; 1 if documents see each other.
    """

    lengths: np.ndarray
    segments: int

    def __init__(self, documents: Sequences, end: int, *, length: int, most: int | None = None):
        """Joins the documents, each with the end token after it.

        Args:
          documents: the documents; their labels have no meaning here.
          end: id of the end token.
          length: number of tokens of a full row.
          most: number of rows to keep, evenly spaced; None keeps all.
        """
        dtype = np.uint16 if max(end, int(documents.tokens.max())) < 2**16 else np.int32
        self.length, self._most = length, most
        self._text = np.insert(documents.tokens.astype(dtype), documents.offsets[1:], end)
        self._starts = documents.offsets + np.arange(
            len(documents.offsets)
        )  # the last is the number of tokens

    def __len__(self) -> int:
        return len(self.lengths)

    @abc.abstractmethod
    def gather(self, indices: np.ndarray, width: int) -> Batch:
        """Returns inputs, labels and, where rows have padding or several segments, segment_ids, all int32 (b, width)."""

    def label_counts(self, vocab_size: int) -> np.ndarray:
        """Returns how often each token is a label, int64 (vocab_size,)."""
        counts = np.zeros(vocab_size, np.int64)
        step = max(1, AT_ONCE // self.length)
        for start in range(0, len(self), step):
            labels = self.gather(np.arange(start, min(start + step, len(self))), self.length)["labels"]
            counts += np.bincount(labels[labels != IGNORE], minlength=vocab_size)
        return counts

    def _kept(self, rows: int) -> np.ndarray:
        """Returns the indices of the rows to keep."""
        if self._most is None or rows <= self._most:
            return np.arange(rows)
        return np.arange(self._most) * rows // self._most

    def _check_width(self, width: int) -> None:
        if self.lengths.max() > width:
            raise ValueError(f"a row of {self.lengths.max()} tokens does not fit into a width of {width}")


class Concatenated(Packed):
    """Documents joined and cut into rows that are all whole."""

    def __init__(self, documents: Sequences, end: int, *, length: int, reset: bool, most: int | None = None):
        """Creates the rows.

        Args:
          reset: whether documents are segments, which do not see each other.

        Raises:
          ValueError: if the documents do not fill a row.
        """
        super().__init__(documents, end, length=length, most=most)
        self._reset, predictions = reset, len(self._text) - 1
        if predictions < length:
            raise ValueError(
                f"length={length}, but all documents together have {predictions} tokens to predict; expected at most that"
            )
        kept = self._kept(-(-predictions // length))
        self._first = np.minimum(kept * length, predictions - length)
        self._repeated = kept * length - self._first  # of the last row
        self.lengths = np.full(len(kept), length, np.int64)
        numbers = np.searchsorted(self._starts, np.stack([self._first, self._first + length - 1]), "right")
        self.segments = int((numbers[1] - numbers[0]).max()) + 1 if reset else 1

    def gather(self, indices: np.ndarray, width: int) -> Batch:
        """Returns inputs and labels, and segment_ids if documents are segments or the width needs padding.

        Raises:
          ValueError: if a row is longer than `width`.
        """
        self._check_width(width)
        columns = np.arange(self.length)
        places = self._first[indices, None] + columns
        inputs, labels = self._text[places].astype(np.int32), self._text[places + 1].astype(np.int32)
        labels[columns < self._repeated[indices, None]] = IGNORE
        arrays = {"inputs": inputs, "labels": labels}
        if self._reset:
            numbers = np.searchsorted(self._starts, places, "right")
            labels[np.searchsorted(self._starts, places + 1, "right") != numbers] = IGNORE
            arrays["segment_ids"] = (numbers - numbers[:, :1] + 1).astype(np.int32)
        elif width > self.length:
            arrays["segment_ids"] = np.ones_like(inputs)
        missing = ((0, 0), (0, width - self.length))
        return {
            name: np.pad(array, missing, constant_values=IGNORE * (name == "labels"))
            for name, array in arrays.items()
        }


class BestFit(Packed):
    """Pieces of documents, fitted into rows."""

    def __init__(self, documents: Sequences, end: int, *, length: int, most: int | None = None):
        """Creates the rows."""
        super().__init__(documents, end, length=length, most=most)
        counts = -(-documents.lengths // length)
        document = np.repeat(np.arange(len(counts)), counts)
        number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
        # The end token is a label but no input.
        first, sizes = number * length, np.minimum(length, documents.lengths[document] - number * length)
        self._first, self._sizes = self._starts[document] + first, sizes
        rows = best_fit(sizes, length)
        self._rows = [rows[row] for row in self._kept(len(rows))]
        self.lengths = np.array([sizes[row].sum() for row in self._rows], np.int64)
        self.segments = max(map(len, self._rows))

    def gather(self, indices: np.ndarray, width: int) -> Batch:
        """Returns inputs, labels and segment_ids, which number the pieces of a row from 1 on.

        Raises:
          ValueError: if a row is longer than `width`.
        """
        self._check_width(width)
        inputs, labels, segment_ids = np.zeros((3, len(indices), width), np.int32)
        labels[:] = IGNORE
        for row, index in enumerate(np.asarray(indices).tolist()):
            column = 0
            for segment, piece in enumerate(self._rows[index], start=1):
                first, size = int(self._first[piece]), int(self._sizes[piece])
                inputs[row, column : column + size] = self._text[first : first + size]
                labels[row, column : column + size] = self._text[first + 1 : first + size + 1]
                segment_ids[row, column : column + size] = segment
                column += size
        return {"inputs": inputs, "labels": labels, "segment_ids": segment_ids}


def best_fit(sizes: np.ndarray, length: int) -> list[list[int]]:
    """Returns rows of indices of pieces by best-fit decreasing; of equal pieces and rows the first goes first.

    Args:
      sizes: number of tokens of each piece, from 1 to `length`.
      length: number of tokens that a row takes.
    """
    rows: list[list[int]] = []
    with_space: list[list[int]] = [[] for _ in range(length + 1)]  # rows by their space, in order
    spaces = 0  # bit s is set if a row has space s
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        if fitting := spaces >> size:
            space = size + (fitting & -fitting).bit_length() - 1
            row = with_space[space].pop(0)
            if not with_space[space]:
                spaces &= ~(1 << space)
            rows[row].append(piece)
        else:
            space, row = length, len(rows)
            rows.append([piece])
        if left := space - size:
            with_space[left].append(row)
            spaces |= 1 << left
    return rows


def pack(
    documents: Sequences, end: int, *, packing: str, length: int, reset: bool = True, most: int | None = None
) -> Packed:
    """Returns the rows of a split; see `Packed`, `Concatenated` and `BestFit` for the arguments.

    Raises:
      ValueError: if there is no such packing, or pieces that are fitted should see each other.
    """
    if packing not in PACKINGS:
        raise ValueError(f"packing={packing!r}; expected one of {', '.join(PACKINGS)}")
    if packing == "concatenate":
        return Concatenated(documents, end, length=length, reset=reset, most=most)
    if not reset:
        raise ValueError(
            "packing='best_fit' with reset=False joins pieces that do not follow each other; expected reset=True, or "
            "packing='concatenate'"
        )
    return BestFit(documents, end, length=length, most=most)
