"""A classifier of sequences: embedding, stack, pooling, one linear map."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.parameters import linear
from layers.reduction import CharacterConfig, Downsample
from layers.segments import SegmentIds, Segments
from layers.typing import Array, Float, Key, Num
from seqmodels.backbone import normalized
from seqmodels.config import ClassifierConfig
from seqmodels.encoder import Encoder, pool
from seqmodels.stack import Stack


class Classifier(Encoder):
    """Logits of the classes per row; a row is one sequence, with or without padding.

    With `molecules` of r tokens it is CANINE (Clark et al. 2022, arXiv:2103.06874), with hash embeddings where the input has them:

        x = characters(embed(tokens));   h = norm(stack(downsample(x)));   logits = W pool(h) + c

    of `layers.reduction.Downsample`, so that layers of the stack read about t / r vectors. Where rows have padding, `segment_ids` say
    that a row is one sequence: `Segments.of(ids, packed=False)`.
    """

    def __init__(self, config: ClassifierConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        if config.molecules is None:
            self.characters = self.downsample = None
        else:
            self.characters = Stack(config.characters, rngs=rngs)
            made = CharacterConfig(
                config.stack.width, rate=config.molecules, dtype=jnp.dtype(config.stack.dtype)
            )
            self.downsample = Downsample(made, rngs=rngs)
        self.head = linear(config.stack.width, config.num_classes, axes=("embed", None), rngs=rngs)

    def encode(
        self,
        inputs: Num[Array, "b t *c"],
        *,
        segments: Segments | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b d"]:
        """Returns one float32 vector per row, of its molecules where the config has them; arguments are those of `features`."""
        if self.downsample is None:
            return super().encode(inputs, segments=segments, key=key)
        keys = (None, None) if key is None else jax.random.split(key)
        x, _ = self.embedding(inputs, segment_ids=segments)
        x, _ = self.characters(x, segment_ids=segments, key=keys[0])
        x, found = self.downsample(x, segment_ids=segments)
        x, _ = self.stack(x, segment_ids=found.segments, key=keys[1])
        x = normalized(self.norm, x, found.segments, key)
        return pool(x.astype(jnp.float32), found.segments.real, self.config.pooling)

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
