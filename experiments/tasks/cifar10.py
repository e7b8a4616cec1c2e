"""The Image task of Long Range Arena: CIFAR-10, pixel by pixel."""

import os
from collections.abc import Mapping
from typing import Any, Literal

from experiments.data import cifar10
from experiments.data.images import Pixels
from experiments.tasks.classification import cross_entropy
from experiments.tasks.task import Task
from layers.options import check_integer
from layers.typing import Array, Float

INPUTS = ("grey", "tokens", "colour")
# Mean and standard deviation: of grey as in the pipelines of S4 and S5; colour is scaled to [-1, 1].
SCALING = {"grey": (122.6 / 255, 61 / 255), "tokens": None, "colour": (0.5, 0.5)}


class CIFAR10(Task):
    """Ten-way classification of images of 1,024 pixels, row by row (Tay et al. 2021, arXiv:2011.04006).

    Published accuracy of grey images: Transformer 42.44% (tokens), S4 88.65%, S5 88.00%, MEGA 90.44%.

    Attributes:
      input_size: 1 (grey) or 3 (colour), if inputs are values; vocab_size: 256, if they are tokens.
      num_classes: number of labels, 10.
      splits: "train" (45,000 images), "validation" (5,000, held out of the training set) and "test" (10,000).
      manifest: manifest of the data set (see `data.cache`).
    """

    num_classes = cifar10.CLASSES
    padding = "end"
    packed = False
    splits: dict[str, Pixels]
    manifest: dict[str, Any]

    def __init__(
        self,
        *,
        official_dir: str | os.PathLike | None = None,
        inputs: Literal["grey", "tokens", "colour"] = "grey",
        seed: int = 0,
        data_dir: str | os.PathLike | None = None,
    ):
        """Loads the data, which are read from the official files on first use.

        Args:
          official_dir: folder cifar-10-batches-bin with CIFAR-10's binary version; it must be given.
          inputs: "grey" (the default, normalised values of ITU-R 601 luma), "tokens" (the same, 0 to 255) or "colour"
            (three values from -1 to 1).
          seed: seed that chooses the validation split.
          data_dir: folder of the cache; by default $SEQMODELS_DATA, else ~/.cache/seqmodels.

        Raises:
          FileNotFoundError: if a file is missing.
          ValueError: if `official_dir` is not given, a file is malformed or a value is invalid.
          CorruptCacheError: if the cached data set is damaged.
        """
        sizes = self.sizes(inputs=inputs)
        self.vocab_size, self.input_size = sizes.get("vocab_size"), sizes.get("input_size")
        check_integer("task.seed", seed, least=0)
        if official_dir is None:
            raise ValueError(
                "task.official_dir is not given; CIFAR-10 is not downloaded: unpack its binary version and pass the folder "
                "cifar-10-batches-bin"
            )
        dataset = cifar10.load(official_dir, colour=inputs == "colour", seed=seed, data_dir=data_dir)
        self.splits = {
            split: Pixels(stored, channels=self.input_size or 1, scaling=SCALING[inputs])
            for split, stored in dataset.splits.items()
        }
        self.manifest = dataset.manifest | {"inputs": inputs}

    @staticmethod
    def sizes(*, inputs: str = "grey", **_: Any) -> dict[str, int]:
        """Returns the model sizes that the options give, without data.

        Raises:
          ValueError: if `inputs` is unknown.
        """
        if inputs not in INPUTS:
            raise ValueError(f"task.inputs={inputs!r} is unknown; choose from {', '.join(INPUTS)}")
        size = {"grey": {"input_size": 1}, "tokens": {"vocab_size": 256}, "colour": {"input_size": 3}}[inputs]
        return {"num_classes": cifar10.CLASSES} | size

    def loss(
        self, outputs: Float[Array, "b c"], batch: Mapping[str, Array]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the mean loss and the sums {"loss", "accuracy", "count"} (see `classification.cross_entropy`)."""
        return cross_entropy(outputs, batch)
