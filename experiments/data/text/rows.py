"""How the documents of a corpus become rows, in training and in evaluation."""

import dataclasses
from typing import Any, Literal

import numpy as np

from experiments.data.sequences import Sequences
from experiments.data.text.decomposition import CURRICULA, Decomposed
from experiments.data.text.knots import Knotted
from experiments.data.text.packing import PACKINGS, Packed, pack
from experiments.data.text.pieces import Pieces
from experiments.data.text.similarity import SPAN, similar_order
from experiments.data.text.stages import Staged, check_stages
from layers.options import Count, checked_dataclass

DECOMPOSE = "decompose"
PIECES = 4  # of a row, unless they are given
# Options of training and what they are if they are not set.
TRAINING = {"stages": (), "order": "given", "shortest": None, "curriculum": None, "cycles": None, "knots": 0}
TRAINING |= {"extent": None, "pieces": None}


@checked_dataclass(section="task")
class RowOptions:
    """How documents become rows. Options of training leave the rows of evaluations as they are without.

    Attributes:
      length: number of tokens of a row.
      packing: "best_fit", which cuts only documents that are longer than a row, "concatenate" (see `packing`), or
        "decompose", rows of single documents by powers of two (see `decomposition`), with evaluations as in "best_fit".
      reset: whether documents of a row are kept apart; False needs "concatenate".
      stages: pairs (length, steps) of stages of training on shorter rows before those of `length` (see `stages`).
      order: "given", or "similar", which joins similar documents in training (see `similarity`); it needs "concatenate" and
        reset=False.
      shortest: tokens of the shortest rows of "decompose"; by default length / 32.
      curriculum: order of their lengths; by default "grow_p2".
      cycles: number of its cycles per epoch; by default 8.
      knots: most places at which a row of training is cut, before its parts are shuffled, each with a token of its own (see `knots`);
        0 for none. It needs "concatenate" and reset=False.
      extent: tokens of a stretch of text of which a row of training has `length`, at their positions in it (see `pieces`); None for whole
        rows. It needs "concatenate" and reset=False.
      pieces: number of pieces of a row, with extent; by default 4.
    """

    length: int
    packing: str = "best_fit"
    reset: bool = True
    stages: tuple[tuple[int, int], ...] = ()
    order: Literal["given", "similar"] = "given"
    shortest: int | None = None
    curriculum: str | None = None
    cycles: int | None = None
    knots: Count = 0
    extent: int | None = None
    pieces: int | None = None

    def __post_init__(self) -> None:
        known = (*PACKINGS, DECOMPOSE)
        if self.packing not in known:
            raise ValueError(f"packing={self.packing!r}; expected one of {', '.join(known)}")
        if not self.reset and self.packing != "concatenate":
            raise ValueError(
                f"packing={self.packing!r} with reset=False joins pieces that do not follow each other; expected reset=True, or "
                "packing='concatenate'"
            )
        if self.order == "similar" and (self.packing != "concatenate" or self.reset):
            raise ValueError(
                f"order='similar' with packing={self.packing!r} and reset={self.reset}: documents that do not see each other "
                "gain nothing; expected packing='concatenate' and reset=False"
            )
        given = [name for name in ("shortest", "curriculum", "cycles") if getattr(self, name) is not None]
        if given and self.packing != DECOMPOSE:
            raise ValueError(
                f"{given[0]}={getattr(self, given[0])!r} has no effect with packing={self.packing!r}; expected None, or "
                "packing='decompose'"
            )
        if self.knots and (self.packing != "concatenate" or self.reset):
            raise ValueError(
                f"knots={self.knots} with packing={self.packing!r} and reset={self.reset}: text that goes on in another part reads the "
                "parts between; expected packing='concatenate' and reset=False"
            )
        self._check_extent()
        if self.packing == DECOMPOSE and self.stages:
            raise ValueError(
                f"stages={self.stages} with packing='decompose', which has lengths of its own; expected ()"
            )
        if self.curriculum not in (None, *CURRICULA):
            raise ValueError(f"curriculum={self.curriculum!r}; expected one of {', '.join(CURRICULA)}")
        check_stages(self.stages, self.length)

    def _check_extent(self) -> None:
        """Raises ValueError unless pieces of stretches fill a row."""
        if self.extent is None:
            if self.pieces is not None:
                raise ValueError(
                    f"pieces={self.pieces} has no effect without extent; expected None, or extent too"
                )
            return
        if self.packing != "concatenate" or self.reset or self.stages or self.knots:
            raise ValueError(
                f"extent={self.extent} with packing={self.packing!r}, reset={self.reset}, stages={self.stages} and knots={self.knots}; "
                "expected packing='concatenate', reset=False and neither of the others"
            )
        pieces = PIECES if self.pieces is None else self.pieces
        if self.length % pieces or self.extent % (self.length // pieces) or self.extent < self.length:
            raise ValueError(
                f"extent={self.extent} with length={self.length} and pieces={pieces}; expected pieces of equal length, of which "
                "an extent of at least the length is a multiple"
            )

    def manifest(self) -> dict[str, Any]:
        """Returns the options as JSON, without those of training that are not set."""
        values = dataclasses.asdict(self)
        values["stages"] = [list(stage) for stage in self.stages]
        return {
            name: value
            for name, value in values.items()
            if name not in TRAINING or value not in ([], TRAINING[name])
        }

    def evaluated(self, documents: Sequences, end: int, most: int | None) -> Packed:
        """Returns the rows of a split for evaluation; see `packing.pack`."""
        packing = "best_fit" if self.packing == DECOMPOSE else self.packing
        return pack(documents, end, packing=packing, length=self.length, reset=self.reset, most=most)

    def trained(
        self, documents: Sequences, end: int, most: int | None, first_tag: int
    ) -> Packed | Staged | Pieces:
        """Returns the rows of the training split.

        Args:
          documents: their labels are their numbers of bytes.
          first_tag: token id of the first tag of `knots`.
        """
        if self.packing == DECOMPOSE:
            given = {"shortest": self.shortest, "curriculum": self.curriculum, "cycles": self.cycles}
            given = {name: value for name, value in given.items() if value is not None}
            return Decomposed(documents, end, length=self.length, most=most, **given)
        if self.order == "similar":
            text_bytes = max(1, int(documents.labels.sum(dtype=np.int64)))
            ngram = max(1, round(SPAN * len(documents.tokens) / text_bytes))
            documents = documents.taken(similar_order(documents, ngram=ngram))
        stages = check_stages(self.stages, self.length)

        def rows(length: int) -> Packed:
            if self.knots:
                return Knotted(documents, end, length=length, tags=self.knots, first_tag=first_tag, most=most)
            return pack(documents, end, packing=self.packing, length=length, reset=self.reset, most=most)

        if self.extent is not None:
            return Pieces(rows(self.extent), length=self.length, pieces=self.pieces or PIECES)
        parts = {length: rows(length) for length in (*(length for length, _ in stages), self.length)}
        return Staged(parts, stages) if stages else parts[self.length]
