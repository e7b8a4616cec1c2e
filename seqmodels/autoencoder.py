"""An autoencoder: embedding, stack, one vector, and a small decoder that reconstructs the sequence from it."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.parameters import linear
from layers.positions import sinusoidal
from layers.segments import SegmentIds, Segments
from layers.typing import Array, Float, Int, Key
from seqmodels.backbone import Backbone, final_norm
from seqmodels.config import AutoencoderConfig
from seqmodels.encoder import pool


class Autoencoder(Backbone):
    """Logits of the token at each position, from one vector per row and the position alone.

        z_t = pooled + sinusoidal(t)
        y_t = W3 norm(gelu(W2 norm(gelu(W1 norm(z_t)))))

    The decoder of MAD's compression task (Poli et al. 2024, arXiv:2403.17844). A row is one sequence.
    """

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        stack = config.stack
        dtype = jnp.dtype(stack.dtype)
        self.norms = nnx.List(final_norm(stack, rngs) for _ in range(3))
        self.maps = nnx.List(
            linear(stack.width, stack.width, axes=("embed", None), dtype=dtype, rngs=rngs) for _ in range(2)
        )
        self.head = linear(
            stack.width, config.input.vocab_size, axes=("embed", "vocab"), dtype=dtype, rngs=rngs
        )

    def __call__(
        self,
        inputs: Int[Array, "b t"],
        state: Any = None,
        *,
        segment_ids: SegmentIds = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "b t v"], None]:
        """Returns the logits of whole sequences.

        Args:
          inputs: token ids (b, t).
          state: must be None, as the vector is known only at the end.
          segment_ids: 0 marks padding.
          key: random key of the dropout; passed in training only.

        Returns:
          float32 logits (b, t, v), and None.
        """
        self._refuse(state, "an autoencoder")
        segments = Segments.of(segment_ids)
        x = self.features(inputs, segments, key=key)
        mask = jnp.ones(x.shape[:2], bool) if segments is None else segments.real
        pooled = pool(x, mask, self.config.pooling)
        x = pooled[:, None] + sinusoidal(jnp.arange(x.shape[1])[None], x.shape[2]).astype(x.dtype)
        for norm, map_ in zip(self.norms, self.maps):
            x = jax.nn.gelu(map_(norm(x, mask=mask, training=key is not None)))
        x = self.norms[2](x, mask=mask, training=key is not None)
        return self.head(x).astype(jnp.float32), None
