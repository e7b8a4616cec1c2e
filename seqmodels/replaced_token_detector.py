"""Replaced-token detection: a small masked language model replaces tokens, and a model tells which were replaced."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layers.channel.glu import ACTIVATIONS
from layers.norms import LayerNorm, LayerNormConfig
from layers.parameters import NO_DECAY, linear, parameter
from layers.segments import SegmentIds, Segments
from layers.typing import Array, Bool, Float, Int, Key
from seqmodels.backbone import Backbone, final_norm, normalized
from seqmodels.config import ReplacedTokenDetectorConfig
from seqmodels.stack import Stack


class ReplacedTokens(NamedTuple):
    """What a `ReplacedTokenDetector` gives.

    Attributes:
      logits: the generator's, of the token at each position.
      scores: the discriminator's logits that a token was replaced.
      replaced: whether it was: a sampled token that is another than the hidden one.
      weight: factor on the discriminator's loss.
    """

    logits: Float[Array, "b t v"]
    scores: Float[Array, "b t"]
    replaced: Bool[Array, "b t"]
    weight: Float[Array, ""]


class ReplacedTokenDetector(Backbone):
    """Tells of each token whether a generator replaced it (ELECTRA, Clark et al. 2020, arXiv:2003.10555; BudgetLongformer, arXiv:2211.17135).

    For a row x of which the tokens at places m are hidden, with e the embedding, E its table and f the activation `transform`:

        g = norm_g(stack_g(W_i e(x)))                       the generator, narrower
        l_t = E layer_norm(f(W_g g_t + a)) + c              logits of the hidden tokens
        z_t ~ softmax(l_t) for t in m, else x_t             no gradient passes the sample
        h = norm(stack(e(z)))                               the discriminator
        s_t = w . f(W_d h_t + d) + b                        logit that z_t was replaced

    Generator and discriminator share the embedding, of the discriminator's width, and the generator's output is tied to it. A sampled
    token that is the hidden one counts as original. The loss is L_MLM(l) + `detection_weight` L_BCE(s), the first as a mean over
    hidden tokens, the second over all real ones.
    """

    def __init__(self, config: ReplacedTokenDetectorConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self._check_tied(True)
        width, own, dtype = config.stack.width, config.generator.width, jnp.dtype(config.stack.dtype)
        zeros = nnx.initializers.zeros_init()
        self.generator_input = linear(width, own, axes=("embed", None), dtype=dtype, rngs=rngs)
        self.generator = Stack(config.generator, rngs=rngs)
        self.generator_norm = final_norm(config.generator, rngs) if config.final_norm else None
        self.generator_transform = linear(own, width, axes=("embed", None), dtype=dtype, rngs=rngs)
        inner = LayerNormConfig(width, config.transform_epsilon, dtype=dtype)
        self.generator_transform_norm = LayerNorm(inner, rngs=rngs)
        vocab = config.input.vocab_size
        self.generator_bias = parameter(rngs, zeros, (vocab,), axes=("vocab",), **NO_DECAY)
        self.transform = linear(width, width, axes=("embed", None), dtype=dtype, rngs=rngs)
        self.score = linear(width, 1, axes=("embed", None), dtype=dtype, rngs=rngs)

    def __call__(
        self,
        inputs: Int[Array, "b t"],
        state: Any = None,
        *,
        labels: Int[Array, "b t"] | None = None,
        segment_ids: SegmentIds = None,
        types: Int[Array, "b t"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[ReplacedTokens, None]:
        """Returns what generator and discriminator say of whole sequences.

        Args:
          inputs: token ids (b, t), with the mask or other tokens at hidden places.
          state: must be None, as every position may depend on all others.
          labels: the hidden tokens, and a negative number elsewhere; None if none is hidden, so that the discriminator reads the inputs.
          segment_ids: segments of packed rows; 0 marks padding.
          types: types of the tokens, where the config has `token_types`; all 0 if None.
          key: random key of the dropout and of the sample; passed in training only. Without it the sample has a key of its own,
            always the same.
        """
        self._refuse(state, "a replaced-token detector")
        segments = Segments.of(segment_ids)
        keys = [None, None] if key is None else [jax.random.fold_in(key, n) for n in range(2)]
        logits = self.generated(inputs, segments, types=types, key=keys[0])
        read, replaced = inputs, jnp.zeros(inputs.shape, bool)
        if labels is not None:
            noise = jax.random.key(0) if key is None else jax.random.fold_in(key, 2)
            sample = jax.random.categorical(noise, jax.lax.stop_gradient(logits)).astype(inputs.dtype)
            read = jnp.where(labels >= 0, sample, inputs)
            replaced = (labels >= 0) & (sample != labels)
        h = self.features(read, segments, types=types, key=keys[1])
        hidden = ACTIVATIONS[self.config.transform](self.transform(h))
        scores = self.score(hidden)[..., 0].astype(jnp.float32)
        weight = jnp.asarray(self.config.detection_weight, jnp.float32)
        return ReplacedTokens(logits, scores, replaced, weight), None

    def generated(
        self,
        inputs: Int[Array, "b t"],
        segments: Segments | None,
        *,
        types: Int[Array, "b t"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b t v"]:
        """Returns the generator's logits, float32."""
        x, _ = self.embedding(inputs, segment_ids=segments, types=types)
        x, _ = self.generator(self.generator_input(x), segment_ids=segments, key=key)
        x = self.generator_transform(normalized(self.generator_norm, x, segments, key))
        x = self.generator_transform_norm(ACTIVATIONS[self.config.transform](x))
        table = self.embedding.table[...].T.astype(x.dtype)
        return jnp.matmul(x, table, preferred_element_type=jnp.float32) + self.generator_bias[...][None, None]
