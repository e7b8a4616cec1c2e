"""Stand-ins for Long Range Arena's Text and Retrieval that need no download: sources of installed packages."""

import os
from collections.abc import Mapping
from typing import Any, ClassVar

from experiments.data import packages
from experiments.data.pairs import Pairs
from experiments.data.sequences import Sequences
from experiments.data.text.characters import BYTES
from experiments.tasks import byte_counts
from experiments.tasks.classification import cross_entropy
from experiments.tasks.task import Task
from layers.options import check_integer
from layers.typing import Array, Float


class PackageText(Task):
    """Which of eight Python packages an excerpt of their sources is from: a stand-in with the shape of IMDB's reviews.

    It says nothing of the accuracy on Text. No file is in two splits; guessing gives 12.5%.

    Attributes:
      vocab_size: number of ids, 257: bytes, and padding (id 0).
      num_classes: number of labels, 8.
      splits: "train" (4,800 excerpts), "validation" and "test" (600 each), equally many of each package.
      manifest: manifest of the data set (see `data.cache`).
    """

    vocab_size = len(BYTES)
    num_classes = len(packages.PACKAGES)
    padding = "end"
    packed = False
    splits: Mapping[str, Sequences]
    manifest: dict[str, Any]

    def __init__(self, *, length: int = 2048, data_dir: str | os.PathLike | None = None):
        """Reads the sources of the installed packages.

        Args:
          length: number of bytes of an excerpt; the last one of a file may be shorter.
          data_dir: folder of the cache; by default $SEQMODELS_DATA, else ~/.cache/seqmodels.

        Raises:
          ValueError: if a package is not installed or too short, or `length` is invalid.
          CorruptCacheError: if the cached data set is damaged.
        """
        check_integer("task.length", length, least=2)
        dataset = packages.load_text(length=length, data_dir=data_dir)
        self.splits, self.manifest = dataset.splits, dataset.manifest

    def loss(
        self, outputs: Float[Array, "b c"], batch: Mapping[str, Array]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the mean loss and the sums {"loss", "accuracy", "count"} (see `classification.cross_entropy`)."""
        return cross_entropy(outputs, batch)

    def baselines(self, split: str = "test") -> dict[str, float]:
        """Returns the accuracy of "byte_counts" (see `byte_counts.accuracy`)."""
        sizes = dict(vocab_size=self.vocab_size, num_classes=self.num_classes)
        return {"byte_counts": byte_counts.accuracy(self.splits, split, **sizes)}


class PackagePairs(Task):
    """Whether two excerpts of Python sources are from one package: a stand-in with the shape of Retrieval's pairs.

    It says nothing of the accuracy on Retrieval. The two are of different files, and no file is in two splits. The inputs of a
    batch are pairs, (b, 2, t); guessing gives 50%.

    Attributes:
      vocab_size: number of ids, 257: bytes, and padding (id 0).
      num_classes: number of labels, 2.
      splits: "train" (9,600 pairs), "validation" and "test" (1,200 each), half of them of one package.
      manifest: manifest of the data set (see `data.cache`).
    """

    vocab_size = len(BYTES)
    num_classes = 2
    pairs: ClassVar[bool] = True
    padding = "end"
    packed = False
    splits: dict[str, Pairs]
    manifest: dict[str, Any]

    def __init__(self, *, length: int = 1024, seed: int = 0, data_dir: str | os.PathLike | None = None):
        """Reads the sources of the installed packages.

        Args:
          length: number of bytes of an excerpt; the last one of a file may be shorter.
          seed: seed that pairs the excerpts.
          data_dir: folder of the cache; by default $SEQMODELS_DATA, else ~/.cache/seqmodels.

        Raises:
          ValueError: if a package is not installed or too short, or a value is invalid.
          CorruptCacheError: if the cached data set is damaged.
        """
        check_integer("task.length", length, least=2)
        check_integer("task.seed", seed, least=0)
        dataset = packages.load_pairs(length=length, seed=seed, data_dir=data_dir)
        self.splits = {split: Pairs(stored) for split, stored in dataset.splits.items()}
        self.manifest = dataset.manifest

    def loss(
        self, outputs: Float[Array, "b c"], batch: Mapping[str, Array]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the mean loss and the sums {"loss", "accuracy", "count"} (see `classification.cross_entropy`)."""
        return cross_entropy(outputs, batch)
