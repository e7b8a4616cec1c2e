"""A backbone: embedding, stack and norm, to which models add their heads."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from layers.norms import make_norm
from layers.segments import Segments
from layers.typing import Array, Float, Int, Key, Num
from seqmodels.config import ModelConfig, StackConfig
from seqmodels.embedding import Embedding
from seqmodels.stack import Stack


class Backbone(nnx.Module):
    """What models of single sequences share: all but the head.

        h = norm(stack(embed(x)))

    With `cross`, options of a cross-attention, the stack is that of a decoder.
    """

    def __init__(self, config: ModelConfig, *, cross: Mapping[str, Any] | None = None, rngs: nnx.Rngs):
        self.config = config
        stack = config.stack
        self.embedding = Embedding(config.input, stack.width, jnp.dtype(stack.dtype), rngs=rngs)
        self.stack = Stack(stack, cross=cross, rngs=rngs)
        self.norm = final_norm(stack, rngs) if config.final_norm else None

    def features(
        self,
        inputs: Num[Array, "b t *c"],
        segments: Segments | None,
        *,
        types: Int[Array, "b t"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b t d"]:
        """Returns h for whole sequences.

        Args:
          inputs: token ids (b, t) or vectors (b, t, c).
          segments: segments of packed rows; 0 marks padding.
          types: types of the tokens, where the config has `token_types`.
          key: random key of the dropout; passed in training only, where BatchNorm uses and updates batch statistics.
        """
        x, _ = self.embedding(inputs, segment_ids=segments, types=types)
        x, _ = self.stack(x, segment_ids=segments, key=key)
        return normalized(self.norm, x, segments, key)

    def _check_tied(self, tied: bool) -> None:
        """Raises ValueError if a head reads a table of tokens that hash embeddings do not have."""
        if tied and (hashes := self.config.input.hashes) is not None:
            raise ValueError(
                f"tie_embeddings=True with hashes={hashes}, which have no row per token; expected tie_embeddings=False"
            )

    def _refuse(self, state: Any, model: str) -> None:
        """Raises ValueError if a state is given to a model of whole sequences; `model` says which, such as "a classifier"."""
        if state is not None:
            steps = ", or its .stack step by step" if self.stack.causal else ""
            raise ValueError(f"{model} takes no state; call it on the whole sequence{steps}")


def final_norm(config: StackConfig, rngs: nnx.Rngs) -> nnx.Module:
    """Returns a norm of what a stack gives."""
    options = dict(config.norm_options)
    return make_norm(config.norm, options, width=config.width, dtype=jnp.dtype(config.dtype), rngs=rngs)


def normalized(
    norm: nnx.Module | None,
    x: Float[Array, "b t d"],
    segments: Segments | None,
    key: Key[Array, ""] | None,
) -> Float[Array, "b t d"]:
    """Returns norm(x), or x without a norm; a key means training."""
    if norm is None:
        return x
    return norm(x, mask=None if segments is None else segments.real, training=key is not None)
