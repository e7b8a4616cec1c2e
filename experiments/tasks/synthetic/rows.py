"""Splits whose rows are computed from their indices, and rows joined from parts."""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from experiments.tasks.synthetic.draws import Draws
from experiments.tasks.tokens import IGNORE

# Splits with more numbers are not kept in memory; their rows are made again in each epoch.
LARGEST_KEPT = 2**26
AT_ONCE = 2**22  # how many are made in one call, so that intermediate arrays stay small

Arrays = dict[str, np.ndarray]


class Rows:
    """A split of a data set in which row i depends only on a key and i.

    Nothing is computed until rows are gathered; small splits are then made as a whole and kept.

    Attributes:
      lengths: number of tokens of each row, int64 (n,).
    """

    def __init__(
        self,
        make: Callable[[Draws], Arrays],
        key: Sequence[int | str],
        *,
        count: int,
        width: int,
        ragged=False,
        features: int = 1,
    ):
        """Creates a split without computing rows.

        Args:
          make: function from the draws of some rows to their arrays: "inputs" and "labels" int (b, width), where labels
            are IGNORE if there is nothing to predict, "lengths" int (b,) if `ragged`, and others (b, width). Inputs may be vectors
            (b, width, features), and labels real numbers, NaN if there is nothing to predict.
          key: key of the draws.
          count: number of rows.
          width: number of tokens of the longest row.
          ragged: whether some rows are shorter.
          features: number of values of a token.

        Raises:
          ValueError: if there are no rows.
        """
        if count < 1:
            raise ValueError(f"a split of {count} sequences; expected at least 1")
        self._make, self._key, self._count, self._width, self._ragged = make, tuple(key), count, width, ragged
        self._numbers = width * features  # of a row

    def __len__(self) -> int:
        return self._count

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        if self._ragged:
            return self._all["lengths"].astype(np.int64)
        return np.full(self._count, self._width, np.int64)

    def gather(self, indices: np.ndarray, width: int) -> Arrays:
        """Returns the rows at `indices`, padded or cut at the end to `width`, int32 or float32.

        Returns:
          inputs (b, width), labels (b, width) and further arrays per position of the task; and segment_ids (b, width; 1
          for tokens, 0 for padding), unless every row of the split fills the width.

        Raises:
          ValueError: if a row is longer than `width`.
        """
        if self._ragged or self._count * self._numbers <= LARGEST_KEPT:
            rows = {name: array[indices] for name, array in self._all.items()}
        else:
            rows = self._made(indices)
        lengths = rows.pop("lengths", np.full(len(indices), self._width))
        if lengths.max() > width:
            raise ValueError(f"a sequence of {lengths.max()} tokens does not fit into a width of {width}")
        rows = {
            name: _resize(array, width, _ignored(array) if name == "labels" else 0)
            for name, array in rows.items()
        }
        if width <= self._shortest:
            return rows
        return rows | {"segment_ids": (np.arange(width) < lengths[:, None]).astype(np.int32)}

    @functools.cached_property
    def _shortest(self) -> int:
        return int(self._all["lengths"].min()) if self._ragged else self._width

    @functools.cached_property
    def _all(self) -> Arrays:
        step = max(1, AT_ONCE // self._numbers)
        parts = [
            self._made(np.arange(start, min(start + step, self._count)))
            for start in range(0, self._count, step)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _made(self, indices: np.ndarray) -> Arrays:
        arrays = self._make(Draws(self._key, indices))
        return {
            name: array.astype(np.float32 if np.issubdtype(array.dtype, np.floating) else np.int32)
            for name, array in arrays.items()
        }


class PairRows(Rows):
    """A split of pairs of a source and a target, of which `make` also returns "source", "source_ids" and "target_ids" (b, width)."""

    def gather(self, indices: np.ndarray, width: int) -> Arrays:
        """Returns the rows at `indices`: inputs and segment_ids (b, 2, width), labels of the targets (b, width), all int32."""
        rows = super().gather(indices, width)
        inputs = np.stack([rows["source"], rows["inputs"]], axis=1)
        ids = np.stack([rows["source_ids"], rows["target_ids"]], axis=1)
        return {"inputs": inputs, "labels": rows["labels"], "segment_ids": ids}


def _ignored(labels: np.ndarray) -> float:
    """Returns the label of a position with nothing to predict."""
    return np.nan if np.issubdtype(labels.dtype, np.floating) else IGNORE


def _resize(array: np.ndarray, width: int, fill: float) -> np.ndarray:
    missing = [(0, 0), (0, max(0, width - array.shape[1])), *[(0, 0)] * (array.ndim - 2)]
    return np.pad(array[:, :width], missing, constant_values=fill)


def joined(parts: Sequence[tuple[np.ndarray, np.ndarray | int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows that are concatenated from parts.

    Args:
      parts: tokens (b, k) and the number of them to take from the start (b,).
      width: width of the result.

    Returns:
      Tokens (b, width), 0 after the last, and the number of tokens per row (b,).
    """
    rows = len(parts[0][0])
    out = np.zeros((rows, width + 1), np.int64)  # the last column takes the tokens that are left out
    end = np.zeros(rows, np.int64)
    for tokens, taken in parts:
        columns = np.arange(tokens.shape[1])
        taken = np.broadcast_to(taken, (rows,))
        places = np.where(columns < taken[:, None], end[:, None] + columns, width)
        np.put_along_axis(out, places, tokens, axis=1)
        end = end + taken
    return out[:, :width], end


def next_tokens(text: np.ndarray, lengths: np.ndarray | int, first: np.ndarray | int) -> Arrays:
    """Returns a text (b, width + 1) as inputs and the next tokens as labels, from text position `first` on; ragged."""
    lengths = np.broadcast_to(lengths, len(text))
    places = np.arange(1, text.shape[1])
    predicted = (places >= np.reshape(first, (-1, 1))) & (places < lengths[:, None])
    labels = np.where(predicted, text[:, 1:], IGNORE)
    # The last token of a text is a label but no input.
    inputs = np.where(places < lengths[:, None], text[:, :-1], 0)
    return {"inputs": inputs, "labels": labels, "lengths": lengths - 1}
