"""What a task is."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from experiments.data.pipeline import Source
from layers.kernels.segments import Padding
from layers.typing import Array, Float

Sums = dict[str, Float[Array, ""]]


class Task(Protocol):
    """Data, loss and metrics; a task does not know the model. Its class inherits from this one.

    Attributes:
      splits: "train", "validation", "test" and further splits by name.
      manifest: what the data are made from, as JSON; a run is resumed with equal data alone.
      vocab_size: inputs are token ids below this.
      input_size: inputs are vectors of this size. A task has one of the two; the model takes its sizes from the task.
      num_classes: labels of whole sequences, where the task has them.
      makes_no_data: whether an object of the class can be made only to know its sizes, in no time.
      padding: where padding may stand in a row: "end", behind all tokens, or "anywhere".
      packed: whether a row may hold more than one sequence.
      selection_metric: the validation metric that chooses the best checkpoint, and "max" or "min". Where a task does not
        set it, the accuracy chooses if there is one, or else the loss.

    `padding` and `packed` are what is known of `segment_ids` before there are any; the model relies on them. A batch whose
    rows are all whole has no `segment_ids`.
    """

    splits: Mapping[str, Source]
    manifest: Mapping[str, Any]
    vocab_size: int | None = None
    input_size: int | None = None
    num_classes: int | None = None
    makes_no_data: ClassVar[bool] = False
    padding: ClassVar[Padding] = "anywhere"
    packed: ClassVar[bool] = True
    selection_metric: ClassVar[tuple[str, str]]

    def loss(self, outputs: Array, batch: Mapping[str, Array]) -> tuple[Float[Array, ""], Sums]:
        """The mean loss of a batch, and sums over examples that include "loss" and "count".

        A sum NAME is averaged over the sum NAME_count where there is one, or else over "count".
        """
        ...

    def baselines(self, split: str) -> dict[str, float]:
        """Metrics of trivial predictors on a split; empty where the task knows none."""
        return {}
