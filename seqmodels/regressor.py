"""A regressor: embedding, stack, norm, and one vector of outputs per token."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from layers.parameters import linear
from layers.segments import SegmentIds, Segments
from layers.typing import Array, Float, Key, Num
from seqmodels.backbone import Backbone
from seqmodels.causality import check_causal
from seqmodels.config import RegressorConfig


class Regressor(Backbone):
    """A vector of real numbers at each position.

        y_t = W h_t + c,   h of a `Backbone`

    Raises:
      ValueError: with `causal`, a mixer of the pattern or the norm is not causal.
    """

    def __init__(self, config: RegressorConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        if config.causal:
            check_causal(self.stack, "a regressor with causal=True")
        self.head = linear(config.stack.width, config.output_size, axes=("embed", None), rngs=rngs)

    def __call__(
        self,
        inputs: Num[Array, "b t *c"],
        state: Any = None,
        *,
        segment_ids: SegmentIds = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "b t o"], None]:
        """Returns the outputs of whole sequences.

        Args:
          inputs: token ids (b, t) or vectors (b, t, c).
          state: must be None.
          segment_ids: segments of packed rows; 0 marks padding.
          key: random key of the dropout; passed in training only.

        Returns:
          float32 outputs (b, t, o), and None.
        """
        self._refuse(state, "a regressor")
        x = self.features(inputs, Segments.of(segment_ids), key=key)
        return self.head(x.astype(jnp.float32)), None
