"""A masked language model: embedding, stack, and the logits of the token at each position."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from layers.channel.glu import ACTIVATIONS
from layers.norms import LayerNorm, LayerNormConfig
from layers.parameters import NO_DECAY, linear, parameter
from layers.segments import SegmentIds, Segments
from layers.typing import Array, Float, Int, Key
from seqmodels.backbone import Backbone
from seqmodels.config import MaskedLanguageModelConfig


class MaskedLanguageModel(Backbone):
    """Logits of the token at each position, of which some were replaced by a mask (BERT, Devlin et al. 2019, arXiv:1810.04805).

        y_t = E norm(f(W h_t + a)) + c,   h of a `Backbone`

    with E the embedding matrix or one of its own, and f the activation `transform`; without it y_t = E h_t + c.
    """

    def __init__(self, config: MaskedLanguageModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self._check_tied(config.tie_embeddings)
        width, vocab, dtype = config.stack.width, config.input.vocab_size, jnp.dtype(config.stack.dtype)
        if config.transform is not None:
            self.transform = linear(width, width, axes=("embed", None), dtype=dtype, rngs=rngs)
            inner = LayerNormConfig(width, config.transform_epsilon, dtype=dtype)
            self.transform_norm = LayerNorm(inner, rngs=rngs)
        head = {"axes": ("embed", "vocab"), "bias": False, "dtype": dtype, "rngs": rngs}
        self.head = None if config.tie_embeddings else linear(width, vocab, **head)
        zeros = nnx.initializers.zeros_init()
        self.bias = parameter(rngs, zeros, (vocab,), axes=("vocab",), **NO_DECAY)

    def __call__(
        self,
        inputs: Int[Array, "b t"],
        state: Any = None,
        *,
        segment_ids: SegmentIds = None,
        types: Int[Array, "b t"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "b t v"], None]:
        """Returns the logits of whole sequences.

        Args:
          inputs: token ids (b, t).
          state: must be None, as every position may depend on all others.
          segment_ids: segments of packed rows; 0 marks padding.
          types: types of the tokens, where the config has `token_types`; all 0 if None.
          key: random key of the dropout; passed in training only.

        Returns:
          float32 logits (b, t, v), and None.
        """
        self._refuse(state, "a masked language model")
        x = self.features(inputs, Segments.of(segment_ids), types=types, key=key)
        if self.config.transform is not None:
            x = self.transform_norm(ACTIVATIONS[self.config.transform](self.transform(x)))
        matrix = self.embedding.table[...].T if self.head is None else self.head.matrix
        logits = jnp.matmul(x, matrix.astype(x.dtype), preferred_element_type=jnp.float32)
        return logits + self.bias[...][None, None], None
