"""A classifier of pairs of sequences: one encoder for both, the features of the pair, a small network."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.parameters import linear
from layers.segments import SegmentIds, Segments
from layers.typing import Array, Float, Int, Key, Num
from seqmodels.config import DualEncoderConfig
from seqmodels.encoder import Encoder

ACTIVATIONS = {"gelu": jax.nn.gelu, "relu": jax.nn.relu}


class DualEncoder(Encoder):
    """Logits of the classes per pair of sequences, which do not see each other before they are pooled.

        u, v = encode(x_1), encode(x_2)
        logits = head([u, v, u * v, u - v])      with interaction="none": head([u, v])

    The two-tower model of Long Range Arena's Retrieval (Tay et al. 2021, arXiv:2011.04006). `encode` is embedding, stack and
    pooling, as in a `Classifier`; the head is a network with `head_sizes` hidden units.
    """

    def __init__(self, config: DualEncoderConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        width = config.stack.width
        hidden = (width,) if config.head_sizes is None else config.head_sizes
        features = {"nli": 4, "none": 2}[config.interaction]
        sizes = (features * width, *hidden, config.num_classes)
        self.head = nnx.List(linear(*pair, rngs=rngs) for pair in itertools.pairwise(sizes))

    def __call__(
        self,
        inputs: Num[Array, "b 2 t *c"],
        state: Any = None,
        *,
        segment_ids: Int[Array, "b 2 t"] | SegmentIds = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "b c"], None]:
        """Returns the logits of pairs of whole sequences.

        Args:
          inputs: token ids (b, 2, t) or vectors (b, 2, t, c).
          state: must be None, as the pooling needs the whole sequences.
          segment_ids: 0 marks padding; (b, 2, t), or `Segments` of the 2 b rows, the two of a pair one after the other.
          key: random key of the dropout; passed in training only, where BatchNorm uses and updates the statistics of all
            2 b rows.

        Returns:
          float32 logits (b, c), and None.

        Raises:
          ValueError: if the inputs are no pairs, or a state is given.
        """
        self._refuse(state, "a dual encoder")
        if inputs.ndim < 3 or inputs.shape[1] != 2:
            raise ValueError(f"inputs have shape {inputs.shape}; expected pairs (b, 2, t) or (b, 2, t, c)")
        if segment_ids is not None and not isinstance(segment_ids, Segments):
            segment_ids = as_rows(jnp.asarray(segment_ids))
        encoded = self.encode(as_rows(inputs), segments=Segments.of(segment_ids), key=key)
        u, v = jnp.moveaxis(encoded.reshape(-1, 2, encoded.shape[1]), 1, 0)
        more = [u * v, u - v] if self.config.interaction == "nli" else []
        x = jnp.concatenate([u, v, *more], axis=-1)
        for layer in self.head[:-1]:
            x = ACTIVATIONS[self.config.head_activation](layer(x))
        return self.head[-1](x), None


def as_rows(pairs: Num[Array, "b 2 t *c"]) -> Num[Array, "r t *c"]:
    """Returns the sequences of pairs as rows, the two of a pair one after the other, so that devices keep whole pairs."""
    return pairs.reshape(-1, *pairs.shape[2:])
