"""The Pathfinder and Path-X tasks of Long Range Arena: are two marked points ends of one dashed curve?"""

import os
from collections.abc import Mapping
from typing import Any, Literal

from experiments.data import pathfinder, pathfinder_datasets
from experiments.data.images import Pixels
from experiments.data.work import refuse_beside_files
from experiments.tasks.classification import cross_entropy
from experiments.tasks.task import Task
from layers.options import check_integer
from layers.typing import Array, Float

SCALING = (0.5, 0.5)  # S5's: values from -1 to 1


class Pathfinder(Task):
    """Whether two marked points are joined by a dashed curve, pixel by pixel (Linsley et al. 2018, arXiv:1805.08315).

    Published accuracy with 32 x 32 pixels: Transformer 71.40%, S4 94.20%, S5 95.33%, MEGA 96.01%; with 128 x 128 (Path-X)
    a Transformer stays at chance, S4 has 96.35%, S5 98.58% and MEGA 97.98%.

    Attributes:
      input_size: 1, if inputs are values; vocab_size: 256, if they are tokens.
      num_classes: number of labels, 2.
      splits: splits "train", "validation" and "test".
      manifest: manifest of the data set (see `data.cache`).
    """

    num_classes = 2
    padding = "end"
    packed = False
    splits: dict[str, Pixels]
    manifest: dict[str, Any]

    def __init__(
        self,
        *,
        size: int = 32,
        inputs: Literal["values", "tokens"] = "values",
        seed: int | None = None,
        train: int | None = None,
        validation: int | None = None,
        test: int | None = None,
        official_dir: str | os.PathLike | None = None,
        data_dir: str | os.PathLike | None = None,
        workers: int | None = None,
    ):
        """Loads the data, which are generated on first use.

        Args:
          size: side of the images: 32 (1,024 pixels), 128 (Path-X, 16,384) or 256. All images are held in memory.
          inputs: "values" (the default, from -1 to 1) or "tokens" (0 to 255, as in Long Range Arena's first models).
          seed: seed of the generator, 0 by default.
          train: number of images in that split, 160,000 by default; likewise `validation` and `test`, 20,000.
          official_dir: folder of one difficulty of Long Range Arena's release, which is used instead of generated data.
          data_dir: folder of the cache; by default $SEQMODELS_DATA, else ~/.cache/seqmodels.
          workers: number of processes that generate; by default one per core.

        Raises:
          ValueError: if `official_dir` is combined with an argument of the generator, or a value is invalid.
          CorruptCacheError: if the cached data set is damaged.
        """
        sizes = self.sizes(inputs=inputs)
        self.vocab_size, self.input_size = sizes.get("vocab_size"), sizes.get("input_size")
        if workers is not None:
            check_integer("task.workers", workers, least=1)
        overrides = dict(seed=seed, train=train, validation=validation, test=test)
        overrides = {name: value for name, value in overrides.items() if value is not None}
        config = pathfinder.PathfinderConfig(size=size, **overrides)
        if official_dir is None:
            dataset = pathfinder_datasets.load_generated(config, data_dir=data_dir, workers=workers)
        else:
            refuse_beside_files(official_dir, [*overrides, *(["workers"] if workers is not None else [])])
            dataset = pathfinder_datasets.load_official(official_dir, size=size, data_dir=data_dir)
        scaling = SCALING if inputs == "values" else None
        self.splits = {split: Pixels(stored, scaling=scaling) for split, stored in dataset.splits.items()}
        self.manifest = dataset.manifest | {"inputs": inputs}

    @staticmethod
    def sizes(*, inputs: str = "values", **_: Any) -> dict[str, int]:
        """Returns the model sizes that the options give, without data.

        Raises:
          ValueError: if `inputs` is neither "values" nor "tokens".
        """
        if inputs not in ("values", "tokens"):
            raise ValueError(f"task.inputs={inputs!r} is unknown; choose 'values' or 'tokens'")
        return {"num_classes": 2} | ({"input_size": 1} if inputs == "values" else {"vocab_size": 256})

    def loss(
        self, outputs: Float[Array, "b c"], batch: Mapping[str, Array]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the mean loss and the sums {"loss", "accuracy", "count"} (see `classification.cross_entropy`)."""
        return cross_entropy(outputs, batch)
