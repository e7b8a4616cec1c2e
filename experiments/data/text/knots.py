"""Untie the Knots: rows whose documents are cut and shuffled, with tags where they go on (Tian et al. 2024, arXiv:2409.04774).

A row of joined documents is cut at up to `tags` random places. Each cut has a tag of its own, a token that stands at the end of the part
before it and at the beginning of the part after it:

    a1 a2 | a3 a4 # b1 | b2 b3 #      ->      a1 a2 <i>  b1 <j>  <i> a3 a4 #  <j> b2 b3 #

Then parts are shuffled. The parts of one document keep their order, so that a tag that is read a second time says which text goes on, and
the last part of the row stays last. The tokens after the second tag are predicted from text that may lie far before. No tag is
predicted. Tags push the end of the row out. The paper draws the number of parts per document, and may leave their order.
"""

import numpy as np

from experiments.data.bucketing import shuffled, uniforms
from experiments.data.pipeline import IGNORE, Batch
from experiments.data.sequences import Sequences
from experiments.data.text.packing import Concatenated

# Distinguishes the draws of a row: of places, of the order of parts and of tags.
PLACES, PARTS, TAGS = range(3)


class Knotted(Concatenated):
    """Documents joined and cut into rows, in each of which they are cut, tagged and shuffled; see above."""

    def __init__(
        self,
        documents: Sequences,
        end: int,
        *,
        length: int,
        tags: int,
        first_tag: int,
        most: int | None = None,
    ):
        """Creates the rows.

        Args:
          tags: largest number of cuts of a row.
          first_tag: token id of the first tag; the others follow.
        """
        super().__init__(documents, end, length=length, reset=False, most=most)
        self._end, self._tags, self._first_tag = end, tags, first_tag

    def gather(self, indices: np.ndarray, width: int) -> Batch:
        """Returns inputs and labels, and segment_ids if the width needs padding; a row depends on its index alone."""
        batch = super().gather(indices, width)
        for row, index in enumerate(np.asarray(indices).tolist()):
            # Labels are the next tokens, so that a text is one token longer than its row.
            text = self._text[self._first[index] :][: self.length + 1].astype(np.int64)
            mixed, counted = knotted(text, self._end, self._tags, self._first_tag, index)
            counted[: self._repeated[index] + 1] &= not self._repeated[index]
            batch["inputs"][row, : self.length] = mixed[: self.length]
            labels = np.where(counted, mixed, IGNORE)[1 : self.length + 1]
            batch["labels"][row, : self.length] = labels
        return batch


def knotted(
    text: np.ndarray, end: int, tags: int, first_tag: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens of a text cut, tagged and shuffled, and which of them are predicted: all but tags and the first.

    The first token of a document, whose predecessor is the end of another one or a tag of another document, is predicted as in rows
    that are not shuffled.

    Args:
      text: joined documents, each but the last with the end token behind it.
      seed: seed of the draws.
    """
    count = int(uniforms(1, seed, PLACES)[0] * (tags + 1))
    places = np.sort(shuffled(len(text) - 1, seed, PLACES)[:count] + 1)
    ends = np.flatnonzero(text[:-1] == end) + 1
    cuts = np.setdiff1d(places, ends)
    names = first_tag + shuffled(tags, seed, TAGS)
    bounds = np.concatenate([[0], np.union1d(cuts, ends), [len(text)]])
    tag_of = dict(zip(cuts.tolist(), names.tolist(), strict=False))
    parts = [
        np.concatenate(
            [
                [tag_of[start]] if start in tag_of else [],
                text[start:stop],
                [tag_of[stop]] if stop in tag_of else [],
            ]
        ).astype(np.int64)
        for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
    ]
    document = np.searchsorted(ends, bounds[:-1], "right")
    # Places are dealt to documents at random, and each document fills its own in order.
    order = np.append(shuffled(len(parts) - 1, seed, PARTS), len(parts) - 1)
    waiting = {number: np.flatnonzero(document == number).tolist() for number in np.unique(document).tolist()}
    mixed = np.concatenate([parts[waiting[int(document[place])].pop(0)] for place in order])
    counted = mixed < first_tag if tags else np.ones(len(mixed), bool)
    counted[0] = False
    return mixed, counted
