"""The Retrieval task of Long Range Arena: does one paper cite the other?"""

import os
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from experiments.data import aan
from experiments.data.pairs import Pairs
from experiments.data.text.characters import BYTES, SPECIALS, check_vocabulary
from experiments.tasks.classification import cross_entropy
from experiments.tasks.task import Task
from layers.options import check_integer
from layers.typing import Array, Float


class AAN(Task):
    """Whether one of two papers cites the other, each read as 4,000 bytes or characters (Tay et al. 2021, arXiv:2011.04006).

    The inputs of a batch are pairs, (b, 2, t). Published accuracy: of bytes Transformer 57.46%; of characters S4 90.90%, S5
    91.40%, MEGA 91.25%.

    Attributes:
      vocab_size: number of ids, 257 of bytes or 98 of characters, padding (id 0) included.
      num_classes: number of labels, 2.
      splits: "train" (147,086 pairs), "validation" (18,090) and "test" (17,437).
      manifest: manifest of the data set (see `data.cache`).
    """

    num_classes = 2
    pairs: ClassVar[bool] = True
    padding = "end"
    packed = False
    splits: dict[str, Pairs]
    manifest: dict[str, Any]

    def __init__(
        self,
        *,
        official_dir: str | os.PathLike | None = None,
        vocabulary: Literal["bytes", "characters"] = "characters",
        length: int = 4000,
        data_dir: str | os.PathLike | None = None,
    ):
        """Reads the pairs, which are encoded on first use.

        Args:
          official_dir: folder `tsv_data` of Long Range Arena's release; it must be given.
          vocabulary: "characters" (the default, as S4 and S5) or "bytes" (Long Range Arena's first models).
          length: number of ids after which a document is cut.
          data_dir: folder of the cache; by default $SEQMODELS_DATA, else ~/.cache/seqmodels.

        Raises:
          FileNotFoundError: if a file is missing.
          ValueError: if `official_dir` is not given, a line is malformed or a value is invalid.
          CorruptCacheError: if the cached data set is damaged.
        """
        self.vocab_size = self.sizes(vocabulary=vocabulary)["vocab_size"]
        check_integer("task.length", length, least=2)
        if official_dir is None:
            raise ValueError(
                "task.official_dir is not given; the texts of AAN are not downloaded: unpack Long Range Arena's release and "
                "give the folder tsv_data"
            )
        dataset = aan.load(official_dir, vocabulary=vocabulary, length=length, data_dir=data_dir)
        self.splits = {split: Pairs(stored) for split, stored in dataset.splits.items()}
        self.manifest = dataset.manifest

    @staticmethod
    def sizes(*, vocabulary: str = "characters", **_: Any) -> dict[str, int]:
        """Returns the model sizes that the options give, without data.

        Raises:
          ValueError: if `vocabulary` is unknown.
        """
        check_vocabulary(vocabulary)
        size = len(BYTES) if vocabulary == "bytes" else len(SPECIALS) + len(aan.CHARACTERS)
        return {"num_classes": 2, "vocab_size": size}

    def loss(
        self, outputs: Float[Array, "b c"], batch: Mapping[str, Array]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the mean loss and the sums {"loss", "accuracy", "count"} (see `classification.cross_entropy`)."""
        return cross_entropy(outputs, batch)
