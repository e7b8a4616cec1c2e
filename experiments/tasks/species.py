"""Species classification: from which genome a window of DNA is."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.data import species
from experiments.data.sequences import Sequences
from experiments.data.text.nucleotides import BASES
from experiments.tasks.classification import cross_entropy
from experiments.tasks.task import Task
from layers.typing import Array, Float


class Species(Task):
    """Which of several species a window of DNA is from, base by base (as in HyenaDNA, Nguyen et al. 2023, arXiv:2306.15794).

    Genomes are FASTA files, or five that are drawn from a seed, a stand-in whose next base depends on the last three.

    Attributes:
      vocab_size: 5: A, C, G, T, and N for an unknown base.
      num_classes: number of species.
      splits: "train", "validation" and "test": the first 80% of each genome and two tenths after them.
      manifest: manifest of the data set (see `data.cache`), with the names of the species.
    """

    vocab_size = len(species.VOCABULARY)
    padding = "end"
    packed = False
    splits: Mapping[str, Sequences]
    manifest: dict[str, Any]

    def __init__(
        self,
        *,
        files: Sequence[str] | None = None,
        length: int = 1024,
        seed: int = 0,
        data_dir: str | os.PathLike | None = None,
    ):
        """Reads the genomes.

        Args:
          files: a FASTA file per species (.fa, .fasta or .fna), by whose name it is called; None for the stand-in.
          length: bases per window.
          seed: seed of the stand-in; 0 with files.
          data_dir: folder of the cache; by default $SEQMODELS_DATA, else ~/.cache/seqmodels.

        Raises:
          ValueError: a file is missing or no FASTA, a genome is too short, or a value is invalid.
          CorruptCacheError: if the cached data set is damaged.
        """
        self.num_classes = self.sizes(files=files)["num_classes"]
        dataset = species.load(files, length=length, seed=seed, data_dir=data_dir)
        self.splits, self.manifest = dataset.splits, dataset.manifest

    @staticmethod
    def sizes(*, files: Sequence[str] | None = None, **_: Any) -> dict[str, int]:
        """Returns the model sizes, without data."""
        species.check_files(files)
        return {
            "vocab_size": Species.vocab_size,
            "num_classes": species.SPECIES if files is None else len(files),
        }

    def loss(
        self, outputs: Float[Array, "b c"], batch: Mapping[str, Array]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the mean loss and the sums {"loss", "accuracy", "count"} (see `classification.cross_entropy`)."""
        return cross_entropy(outputs, batch)

    def baselines(self, split: str = "test") -> dict[str, float]:
        """Returns the accuracies of the most frequent species in training, "majority", and of chains of order 0 and 3.

        A chain, "order_0" or "order_3", has each species' frequencies of a base after the last ones in training, and takes the species
        under which a window is likeliest.
        """
        train, tested = self.splits["train"], self.splits[split]
        counts = np.bincount(train.labels, minlength=self.num_classes)
        found = {"majority": float(np.mean(tested.labels == counts.argmax()))}
        for order in (0, species.ORDER):
            tables = np.ones((self.num_classes, len(BASES) ** order, len(BASES)))
            for number in range(self.num_classes):
                np.add.at(tables[number], _steps(_windows(train)[train.labels == number], order), 1)
            logs = np.log(tables / tables.sum(-1, keepdims=True))
            chosen = [
                np.argmax([table[_steps(window[None], order)].sum() for table in logs])
                for window in _windows(tested)
            ]
            found[f"order_{order}"] = float(np.mean(np.array(chosen) == tested.labels))
        return found


def _windows(stored: Sequences) -> np.ndarray:
    return stored.tokens.reshape(len(stored), -1)


def _steps(windows: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the states, numbers of the last `order` bases, and the bases after them, where all are known."""
    count = windows.shape[1] - order
    columns = [windows[:, place : place + count].astype(np.int64) for place in range(order + 1)]
    known = np.all([column < len(BASES) for column in columns], axis=0)
    state = np.zeros_like(columns[0])
    for column in columns[:-1]:
        state = state * len(BASES) + column
    return state[known], columns[-1][known]
