"""A regressor: embedding, stack, norm, and one vector of outputs per token."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from layers.norms import make_norm
from layers.parameters import linear
from layers.segments import SegmentIds, Segments
from layers.typing import Array, Float, Key, Num
from seqmodels.causality import check_causal
from seqmodels.config import RegressorConfig
from seqmodels.embedding import Embedding
from seqmodels.stack import Stack


class Regressor(nnx.Module):
    """A vector of real numbers at each position.

        y_t = W norm(h_t) + c,   h the output of the stack

    Raises:
      ValueError: with `causal`, a mixer of the pattern or the norm is not causal.
    """

    def __init__(self, config: RegressorConfig, *, rngs: nnx.Rngs):
        self.config = config
        stack = config.stack
        dtype = jnp.dtype(stack.dtype)
        self.embedding = Embedding(config.input, stack.width, dtype, rngs=rngs)
        self.stack = Stack(stack, rngs=rngs)
        if config.causal:
            check_causal(self.stack, "a regressor with causal=True")
        options = dict(stack.norm_options)
        self.norm = (
            make_norm(stack.norm, options, width=stack.width, dtype=dtype, rngs=rngs)
            if config.final_norm
            else None
        )
        self.head = linear(stack.width, config.output_size, axes=("embed", None), rngs=rngs)

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
        if state is not None:
            raise ValueError(
                "a regressor takes no state; call it on the whole sequence, or its .stack step by step"
            )
        segments = Segments.of(segment_ids)
        x, _ = self.embedding(inputs, segment_ids=segments)
        x, _ = self.stack(x, segment_ids=segments, key=key)
        if self.norm is not None:
            x = self.norm(x, mask=None if segments is None else segments.real, training=key is not None)
        return self.head(x.astype(jnp.float32)), None
