"""A language model: a backbone and an output matrix."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from layers.cross_entropy import Unprojected
from layers.mixer import Source, check_place
from layers.parameters import linear
from layers.segments import Place, SegmentIds, Segments
from layers.typing import Array, Float, Int, Key
from seqmodels.backbone import Backbone, normalized
from seqmodels.block import Encoded
from seqmodels.causality import check_causal
from seqmodels.config import LanguageModelConfig
from seqmodels.width_transfer import logit_factor


class LanguageModelState(NamedTuple):
    """The place of the rows, if the embedding adds positions, the state of each layer, and what a decoder's layers read of a source."""

    place: Place | None
    layers: tuple[Any, ...]
    sources: tuple[Source, ...] | None = None


class LanguageModel(Backbone):
    """Logits of the next token at each position.

    With `cross`, options of a cross-attention, it is the decoder of an `EncoderDecoder`, and calls need a source.

    Raises:
      ValueError: a mixer of the pattern or the norm is not causal.
    """

    def __init__(
        self, config: LanguageModelConfig, *, cross: Mapping[str, Any] | None = None, rngs: nnx.Rngs
    ):
        super().__init__(config, cross=cross, rngs=rngs)
        self._check_tied(config.tie_embeddings)
        check_causal(self.stack, "a language model")
        stack = config.stack
        options = {"axes": ("embed", "vocab"), "bias": False, "dtype": jnp.dtype(stack.dtype), "rngs": rngs}
        head = partial(linear, stack.width, config.input.vocab_size, **options)
        self.head = None if config.tie_embeddings else head()

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> LanguageModelState:
        """Returns the initial state; `max_length` bounds the tokens that key-value caches must hold."""
        layers = self.stack.init_state(batch_size, max_length=max_length)
        return LanguageModelState(self.embedding.init_state(batch_size), layers)

    def _checked(self, state: Any, rows: int) -> LanguageModelState:
        """Returns the state, or raises if it is not one of this model for as many rows; each mixer checks its own."""
        if not isinstance(state, LanguageModelState):
            raise TypeError(
                f"state of a language model is a {type(state).__name__}; expected what its init_state returns"
            )
        expected = self.embedding.init_state(rows)
        if (state.place is None) != (expected is None):
            positions = self.config.input.absolute_positions
            raise ValueError(
                f"state has {'no ' if state.place is None else ''}place of its rows, but absolute_positions="
                f"{positions!r}; expected the state of a model with the same positions"
            )
        if expected is not None:
            check_place("a language model", state.place, rows)
        return state

    def __call__(
        self,
        inputs: Int[Array, "b t"],
        state: LanguageModelState | None = None,
        *,
        segment_ids: SegmentIds = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "b t v"], LanguageModelState | None]:
        """Returns the logits of the next token at each position.

        Args:
          inputs: token ids (b, t) for any t: a whole text, a part of it or one token.
          state: state from `init_state` or an earlier call; None if no state is carried.
          segment_ids: segments of packed rows; 0 marks padding.
          key: random key of the dropout; passed in training only.

        Returns:
          float32 logits (b, t, v), and the state that the next call continues (None if none was passed).
        """
        outputs, state = self.unprojected(inputs, state, segment_ids=segment_ids, key=key)
        return outputs.logits, state

    def unprojected(
        self,
        inputs: Int[Array, "b t"],
        state: LanguageModelState | None = None,
        *,
        segment_ids: SegmentIds = None,
        key: Key[Array, ""] | None = None,
        source: Encoded | None = None,
    ) -> tuple[Unprojected, LanguageModelState | None]:
        """Returns what the logits are computed from, and the next state; see `__call__`.

        A decoder reads `source`, or with a state the sources in it.

        `layers.cross_entropy.linear_cross_entropy` takes it in place of logits.
        """
        segments = Segments.of(segment_ids)
        place, layers = (None, None) if state is None else self._checked(state, inputs.shape[0])[:2]
        x, place = self.embedding(inputs, place, segment_ids=segments)
        source = source if state is None else state.sources
        x, layers = self.stack(x, layers, segment_ids=segments, key=key, source=source)
        state = None if state is None else state._replace(place=place, layers=layers)
        return self.outputs(normalized(self.norm, x, segments, key)), state

    def outputs(self, x: Float[Array, "b t d"]) -> Unprojected:
        """Returns what the logits of features behind the last norm are computed from."""
        if (factor := logit_factor(self.config)) != 1:
            x = factor * x
        matrix = self.embedding.table[...] if self.head is None else self.head.matrix.T
        return Unprojected(x, matrix, self.config.logit_cap)
