"""The Text task of Long Range Arena: the sentiment of IMDB reviews, byte by byte or character by character."""

import os
from collections.abc import Mapping
from typing import Any, Literal

from experiments.data import imdb
from experiments.data.sequences import Sequences
from experiments.data.text.characters import BYTES, check_vocabulary
from experiments.tasks.classification import cross_entropy
from experiments.tasks.task import Task
from layers.options import check_integer
from layers.typing import Array, Float


class IMDB(Task):
    """Whether a film review is positive, read as 4,096 bytes or characters (Tay et al. 2021, arXiv:2011.04006).

    Published accuracy: of bytes Transformer 64.27%; of characters S4 86.82%, S5 89.31%, MEGA 90.43%. Long Range Arena's own
    code, S4 and S5 choose the best epoch on the test reviews; here validation reviews are held out of the training set.

    Attributes:
      vocab_size: number of ids, 257 of bytes or 135 of characters, padding (id 0) included.
      num_classes: number of labels, 2: negative and positive.
      splits: "train" (22,500 reviews), "validation" (2,500, held out of the training set) and "test" (25,000).
      manifest: manifest of the data set (see `data.cache`).
    """

    num_classes = len(imdb.LABELS)
    padding = "end"
    packed = False
    splits: Mapping[str, Sequences]
    manifest: dict[str, Any]

    def __init__(
        self,
        *,
        official_dir: str | os.PathLike | None = None,
        tfds_dir: str | os.PathLike | None = None,
        vocabulary: Literal["bytes", "characters"] = "characters",
        length: int = 4096,
        validation: int = 2500,
        seed: int = 0,
        data_dir: str | os.PathLike | None = None,
    ):
        """Reads the reviews, which are encoded on first use.

        Args:
          official_dir: folder aclImdb of the official archive.
          tfds_dir: folder of tensorflow-datasets with `imdb_reviews`, in place of `official_dir`.
          vocabulary: "characters" (the default, as S4 and S5) or "bytes" (Long Range Arena's first models).
          length: number of ids after which a review is cut.
          validation: number of training reviews held out for validation.
          seed: seed that chooses them.
          data_dir: folder of the cache; by default $SEQMODELS_DATA, else ~/.cache/seqmodels.

        Raises:
          FileNotFoundError: if a folder is missing.
          ValueError: if none or both of the folders are given, a file is malformed or a value is invalid.
          CorruptCacheError: if the cached data set is damaged.
        """
        self.vocab_size = self.sizes(vocabulary=vocabulary)["vocab_size"]
        check_integer("task.length", length, least=2)
        check_integer("task.validation", validation, least=1)
        check_integer("task.seed", seed, least=0)
        dataset = imdb.load(
            official_dir=official_dir,
            tfds_dir=tfds_dir,
            vocabulary=vocabulary,
            length=length,
            validation=validation,
            seed=seed,
            data_dir=data_dir,
        )
        self.splits, self.manifest = dataset.splits, dataset.manifest

    @staticmethod
    def sizes(*, vocabulary: str = "characters", **_: Any) -> dict[str, int]:
        """Returns the model sizes that the options give, without data.

        Raises:
          ValueError: if `vocabulary` is unknown.
        """
        check_vocabulary(vocabulary)
        size = len(BYTES) if vocabulary == "bytes" else imdb.CHARACTERS
        return {"num_classes": len(imdb.LABELS), "vocab_size": size}

    def loss(
        self, outputs: Float[Array, "b c"], batch: Mapping[str, Array]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the mean loss and the sums {"loss", "accuracy", "count"} (see `classification.cross_entropy`)."""
        return cross_entropy(outputs, batch)
