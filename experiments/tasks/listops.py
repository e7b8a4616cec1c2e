"""The ListOps task of Long Range Arena: evaluate a nested expression, an answer of one digit."""

import os
from collections.abc import Mapping
from typing import Any

from experiments.data import listops, listops_datasets
from experiments.data.sequences import Sequences
from experiments.data.work import refuse_beside_files
from experiments.tasks.classification import cross_entropy
from experiments.tasks.task import Task
from layers.options import check_integer
from layers.typing import Array, Float


class ListOps(Task):
    """Ten-way classification of ListOps expressions (Nangia and Bowman 2018, arXiv:1804.06028).

    Published accuracy on the full task: Transformer 36.4% (what the root operator alone gives), S4 59.6%, S5 62.2%.

    Attributes:
      vocab_size: number of tokens, 16, padding (id 0) included.
      num_classes: number of labels, 10.
      splits: splits "train", "validation" and "test".
      manifest: manifest of the data set (see `data.cache`).
    """

    vocab_size = len(listops.VOCABULARY)
    num_classes = listops.NUM_CLASSES
    padding = "end"
    packed = False
    splits: dict[str, Sequences]
    manifest: dict[str, Any]

    def __init__(
        self,
        *,
        preset: str | None = None,
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
          preset: configuration of the generator: "full" (the default, Long Range Arena's) or "short" (the same grammar
            with short sequences, for a CPU).
          seed: seed of the generator, 0 by default.
          train: number of sequences in that split, in place of the preset's; likewise `validation` and `test`.
          official_dir: folder with Long Range Arena's TSV files, which are used instead of generated data.
          data_dir: folder of the cache; by default $SEQMODELS_DATA, else ~/.cache/seqmodels.
          workers: number of processes that generate; by default one per core.

        Raises:
          ValueError: if `official_dir` is combined with an argument of the generator, or a value is invalid.
          CorruptCacheError: if the cached data set is damaged.
        """
        if workers is not None:
            check_integer("task.workers", workers, least=1)
        overrides = dict(seed=seed, train=train, validation=validation, test=test)
        overrides = {name: value for name, value in overrides.items() if value is not None}
        if official_dir is None:
            config = listops.preset_config("full" if preset is None else preset, **overrides)
            dataset = listops_datasets.load_generated(config, data_dir=data_dir, workers=workers)
        else:
            others = dict(preset=preset, workers=workers)
            refuse_beside_files(
                official_dir, [*overrides, *(name for name, value in others.items() if value is not None)]
            )
            dataset = listops_datasets.load_official(official_dir, data_dir=data_dir)
        self.splits = dataset.splits
        self.manifest = dataset.manifest

    def loss(
        self, outputs: Float[Array, "b c"], batch: Mapping[str, Array]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the mean loss and the sums {"loss", "accuracy", "count"} (see `classification.cross_entropy`)."""
        return cross_entropy(outputs, batch)

    def baselines(self, split: str = "test") -> dict[str, float]:
        """Returns the accuracies of "majority" and "root_operator", fitted on "train" (see `listops_datasets`)."""
        return listops_datasets.split_baselines(self.splits, split)
