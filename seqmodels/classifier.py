"""A classifier of sequences: embedding, stack, pooling, one linear map."""

from typing import Any

from flax import nnx

from layers.parameters import linear
from layers.segments import SegmentIds, Segments
from layers.typing import Array, Float, Key, Num
from seqmodels.config import ClassifierConfig
from seqmodels.encoder import Encoder


class Classifier(Encoder):
    """Logits of the classes per row; a row is one sequence, with or without padding."""

    def __init__(self, config: ClassifierConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.head = linear(config.stack.width, config.num_classes, axes=("embed", None), rngs=rngs)

    def __call__(
        self,
        inputs: Num[Array, "b t *c"],
        state: Any = None,
        *,
        segment_ids: SegmentIds = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "b c"], None]:
        """Returns the logits of whole sequences.

        Args:
          inputs: token ids (b, t) or vectors (b, t, c).
          state: must be None, as the pooling needs the whole sequence.
          segment_ids: 0 marks padding.
          key: random key of the dropout; passed in training only, where BatchNorm uses and updates batch statistics.

        Returns:
          float32 logits (b, c), and None.
        """
        self._refuse(state, "a classifier")
        return self.head(self.encode(inputs, segments=Segments.of(segment_ids), key=key)), None
