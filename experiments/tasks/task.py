"""The protocol of tasks."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from experiments.data.pipeline import Source
from layers.kernels.segments import Padding
from layers.typing import Array, Float

Sums = dict[str, Float[Array, ""]]


class Task(Protocol):
    """Data, loss and metrics, independent of the model. Classes of tasks inherit from this one.

    Attributes:
      splits: splits by name: "train", "validation", "test" and others.
      manifest: parameters that determine the data, as JSON; a run resumes only with equal data.
      vocab_size: number of tokens, if inputs are token ids.
      input_size: number of features, if inputs are vectors. A task has one of the two; the model takes its sizes from the
        task.
      num_classes: number of labels of whole sequences, if the task has them.
      output_size: number of real numbers that are asked for at a token, if the task is a regression of tokens.
      causal: whether inputs hold what earlier tokens are asked for, so that a regressor must be causal.
      pairs: whether the labels belong to pairs of sequences; inputs and segment ids then are (b, 2, t), and the model is a
        `DualEncoder`.
      has_source: whether rows are pairs of a source and a target; inputs and segment ids then are (b, 2, t), labels are those of the
        target, and the model is an `EncoderDecoder`.
      names_items: whether targets name the items of their source, from 1 on, with 0 for start and end; then the model is a `PointerNetwork`.
        Where items are vectors, inputs are (b, 2, t, c), and targets are the first of their numbers.
      masks: whether inputs are rows of which some tokens are hidden, the labels, so that the model is a `MaskedLanguageModel` or a
        `ReplacedTokenDetector`.
      sizes: static method that a task may have: it returns the sizes above that its options give, without data.
      makes_no_data: whether creating an object of the class is cheap, so that it can be created only for its sizes.
      padding: places where padding may occur in a row: "end", after all tokens, or "anywhere".
      packed: whether a row may hold more than one segment, or the most segments of a row, which fast attention needs.
      unprojected: whether `loss` takes `Unprojected` of a language model, so that the logits need not be in memory at once;
        see `layers.cross_entropy`.
      selection_metric: validation metric that chooses the best checkpoint, and "max" or "min". If a task does not set it,
        it is the accuracy if there is one, or else the loss.

    `padding` and `packed` are static facts about `segment_ids`; the model relies on them. A batch without padding has no
    `segment_ids`.
    """

    splits: Mapping[str, Source]
    manifest: Mapping[str, Any]
    vocab_size: int | None = None
    input_size: int | None = None
    num_classes: int | None = None
    output_size: int | None = None
    causal: ClassVar[bool] = False
    pairs: ClassVar[bool] = False
    has_source: ClassVar[bool] = False
    names_items: ClassVar[bool] = False
    masks: ClassVar[bool] = False
    makes_no_data: ClassVar[bool] = False
    padding: ClassVar[Padding] = "anywhere"
    packed: ClassVar[bool | int] = True
    unprojected: ClassVar[bool] = False
    selection_metric: ClassVar[tuple[str, str]]

    def loss(self, outputs: Array, batch: Mapping[str, Array]) -> tuple[Float[Array, ""], Sums]:
        """Returns the mean loss of a batch, and sums over examples that include "loss" and "count".

        A sum NAME is divided by the sum NAME_count if there is one, or else by "count".
        """
        ...

    def baselines(self, split: str) -> dict[str, float]:
        """Returns the metrics of trivial predictors on a split; empty if the task has none."""
        return {}
