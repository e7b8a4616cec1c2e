"""Rows of which some tokens are hidden, to be predicted from the others."""

from collections.abc import Iterator, Mapping

import numpy as np

from experiments.data.pipeline import IGNORE, Batch, Source
from experiments.data.schedules import Passes
from layers.options import Count, Fraction, UnitInterval, checked_dataclass

AT_ONCE = 256  # rows that are counted in one call


@checked_dataclass(section="task")
class Masking:
    """Which tokens are hidden, and how, as in BERT (Devlin et al. 2019, arXiv:1810.04805).

    Attributes:
      mask_rate: the part of the real tokens of a row that is chosen, rounded, at least one token.
      masked: the part of the chosen tokens in whose place the mask stands.
      random: the part that a random token replaces. The others stay as they are, but are predicted too.
      mask_seed: seed of the choices. Each pass over the training split has choices of its own.
    """

    mask_rate: Fraction = 0.15
    masked: UnitInterval = 0.8
    random: UnitInterval = 0.1
    mask_seed: Count = 0

    def __post_init__(self) -> None:
        if not self.mask_rate:
            raise ValueError("mask_rate=0 hides no token; expected more than 0, such as 0.15")
        if self.masked + self.random > 1 + 1e-9:
            raise ValueError(
                f"masked={self.masked} and random={self.random} are parts of the chosen tokens; expected a sum of at most 1"
            )


class Masked(Passes):
    """A split whose labels are chosen tokens; a source of `pipeline`.

    The choices of a row follow from the seed, the row and the number of the pass over the split, 0 outside training.

    Attributes:
      lengths: number of tokens of each row.
    """

    def __init__(self, rows: Source, masking: Masking, *, mask: int):
        """Creates the split.

        Args:
          rows: rows of tokens; their labels are not read.
          mask: id of the mask. Random tokens are below it.
        """
        self._rows, self._masking, self._mask = rows, masking, mask
        self.lengths = rows.lengths
        self.widths = (int(self.lengths.max()),)

    def gather(self, indices: np.ndarray, width: int) -> Batch:
        """Returns the rows with "labels" (b, width): the token at chosen places, and IGNORE elsewhere.

        Args:
          indices: numbers of rows, plus `len(self)` for each earlier pass.
        """
        passes, rows = np.divmod(np.asarray(indices), len(self))
        batch = dict(self._rows.gather(rows, width))
        inputs = np.array(batch["inputs"], np.int32)
        labels = np.full(inputs.shape, IGNORE, np.int32)
        for place, (number, row) in enumerate(zip(passes.tolist(), rows.tolist(), strict=True)):
            real = np.ones(width, bool) if "segment_ids" not in batch else batch["segment_ids"][place] != 0
            self._hide(inputs[place], labels[place], np.flatnonzero(real), number, row)
        return batch | {"inputs": inputs, "labels": labels}

    def _hide(
        self, inputs: np.ndarray, labels: np.ndarray, places: np.ndarray, number: int, row: int
    ) -> None:
        """Writes the labels of a row and what stands in their place, given the places of real tokens."""
        options = self._masking
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((options.mask_seed, number, row))))
        count = max(1, round(options.mask_rate * len(places)))
        chosen = rng.permutation(places)[:count]
        how, others = rng.random(count), rng.integers(0, self._mask, count)
        labels[chosen] = inputs[chosen]
        kept = np.where(how < options.masked + options.random, others, inputs[chosen])
        inputs[chosen] = np.where(how < options.masked, self._mask, kept)

    def token_counts(self) -> np.ndarray:
        """Returns how often each token occurs, int64 (mask,)."""
        found = np.zeros(self._mask, np.int64)
        for batch in self._whole():
            real = (
                batch["inputs"] if "segment_ids" not in batch else batch["inputs"][batch["segment_ids"] != 0]
            )
            found += np.bincount(real.ravel(), minlength=self._mask)
        return found

    def pair_counts(self) -> np.ndarray:
        """Returns how often each token follows each other one in a row, int64 (mask + 1, mask + 1).

        The last row and column stand for the edge of a segment.
        """
        found = np.zeros((self._mask + 1, self._mask + 1), np.int64)
        for batch in self._whole():
            np.add.at(found, neighbours(batch, batch["inputs"], self._mask), 1)
        return found

    def _whole(self) -> Iterator[Batch]:
        """Yields all rows with no token hidden."""
        for start in range(0, len(self), AT_ONCE):
            yield self._rows.gather(np.arange(start, min(start + AT_ONCE, len(self))), self.widths[0])


def neighbours(
    batch: Mapping[str, np.ndarray], tokens: np.ndarray, edge: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pairs of tokens that follow each other in a segment, `edge` before its first and behind its last.

    Args:
      tokens: (b, t), of which those with segment id 0 are left out.
    """
    ids = batch.get("segment_ids", np.ones(tokens.shape, np.int32))
    ids, tokens = (np.pad(array, ((0, 0), (1, 1))) for array in (ids, tokens))
    same = ids[:, :-1] == ids[:, 1:]
    left, right = ids[:, :-1] != 0, ids[:, 1:] != 0
    first, second = tokens[:, :-1], tokens[:, 1:]
    starts, ends = right & ~same, left & ~same
    inside = left & same
    return (
        np.concatenate([first[inside], np.full(starts.sum(), edge), first[ends]]),
        np.concatenate([second[inside], second[starts], np.full(ends.sum(), edge)]),
    )
