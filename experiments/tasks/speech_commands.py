"""Speech Commands, sample by sample or as spectrograms."""

import os
from collections.abc import Mapping
from typing import Any, Literal

from experiments.data import speech_commands
from experiments.data.log_mel import BANDS
from experiments.data.speech_commands import Clips, Spectrograms
from experiments.tasks.classification import cross_entropy
from experiments.tasks.task import Task
from layers.options import check_integer, check_value
from layers.typing import Array, Float

EPSILON = 1e-5  # added to the deviation, as in S4's pipeline


class SpeechCommands(Task):
    """Which of 35 words is spoken in 16,000 samples, one second (Warden 2018, arXiv:1804.03209).

    Samples are scaled by mean and deviation of the training clips, as in the pipeline of S4. Published test accuracies (S5, arXiv:2208.04933),
    which nothing here was compared with: S4 96.08% and S5 96.52%; of the same models at 8 kHz, with steps twice as long, 91.32% and
    94.53%. With features="log_mel" a clip is 100 vectors of 80 numbers, the input of Whisper's encoder (`data.log_mel`).

    Attributes:
      input_size: 1, or 80; num_classes: 35.
      splits: "train", and "validation" and "test" of the official lists.
      manifest: manifest of the data set (see `data.cache`).
    """

    num_classes = len(speech_commands.WORDS)
    padding = "end"
    packed = False
    splits: dict[str, Clips] | dict[str, Spectrograms]
    manifest: dict[str, Any]

    def __init__(
        self,
        *,
        official_dir: str | os.PathLike | None = None,
        stride: int = 1,
        features: Literal["samples", "log_mel"] = "samples",
        data_dir: str | os.PathLike | None = None,
    ):
        """Loads the clips, which are read from the official files on first use.

        Args:
          official_dir: folder of speech_commands_v0.02, with a folder per word and both lists; it must be given.
          stride: every stride-th sample is read, without a filter, as in the published tests at 8 kHz (2).
          features: "samples", or "log_mel" for spectrograms, which take all samples.
          data_dir: folder of the cache; by default $SEQMODELS_DATA, else ~/.cache/seqmodels.

        Raises:
          FileNotFoundError: if a list or the folder of a word is missing.
          ValueError: if `official_dir` is not given, a file is malformed or a value is invalid.
          CorruptCacheError: if the cached data set is damaged.
        """
        self.input_size = self.sizes(features=features)["input_size"]
        check_integer("task.stride", stride, least=1)
        if stride > speech_commands.SAMPLES:
            raise ValueError(f"task.stride={stride}; expected at most {speech_commands.SAMPLES}")
        if features == "log_mel" and stride != 1:
            raise ValueError(
                f"task.stride={stride} with task.features='log_mel', which takes all samples; expected 1"
            )
        if official_dir is None:
            raise ValueError(
                "task.official_dir is not given; Speech Commands is not downloaded: unpack speech_commands_v0.02.tar.gz and pass "
                "its folder"
            )
        dataset = speech_commands.load(official_dir, data_dir=data_dir)
        self.manifest = dataset.manifest | {"stride": stride, "features": features}
        if features == "log_mel":
            self.splits = {split: Spectrograms(stored) for split, stored in dataset.splits.items()}
            return
        mean, deviation = speech_commands.moments(dataset.splits["train"])
        self.splits = {
            split: Clips(stored, mean=mean, deviation=deviation + EPSILON, stride=stride)
            for split, stored in dataset.splits.items()
        }

    @staticmethod
    def sizes(*, features: str = "samples", **_: Any) -> dict[str, int]:
        """Returns the model sizes that the options give, without data.

        Raises:
          ValueError: if `features` is unknown.
        """
        check_value("task.features", features, Literal["samples", "log_mel"])
        return {
            "num_classes": SpeechCommands.num_classes,
            "input_size": BANDS if features == "log_mel" else 1,
        }

    def loss(
        self, outputs: Float[Array, "b c"], batch: Mapping[str, Array]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the mean loss and the sums {"loss", "accuracy", "count"} (see `classification.cross_entropy`)."""
        return cross_entropy(outputs, batch)
