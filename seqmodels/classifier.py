"""A classifier of sequences: embedding, stack, pooling, one linear map."""

import functools
import logging
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx

from layers.mixers import MIXERS
from layers.norms import make_norm
from layers.parameters import linear
from layers.segments import SegmentIds, Segments, select_masked
from layers.typing import Array, Bool, Float, Key, Num
from seqmodels.config import ClassifierConfig
from seqmodels.embedding import Embedding
from seqmodels.stack import Stack

_log = logging.getLogger(__name__)


class Classifier(nnx.Module):
    """Logits of the classes per row; a row is one sequence, with or without padding."""

    def __init__(self, config: ClassifierConfig, *, rngs: nnx.Rngs):
        self.config = config
        stack = config.stack
        dtype = jnp.dtype(stack.dtype)
        self.embedding = Embedding(config.input, stack.width, dtype, rngs=rngs)
        self.stack = Stack(stack, rngs=rngs)
        if self.stack.causal:
            _say_causal(tuple(dict.fromkeys(stack.mixer_of(layer)[0] for layer in range(stack.depth))))
        norm = partial(
            make_norm, stack.norm, dict(stack.norm_options), width=stack.width, dtype=dtype, rngs=rngs
        )
        self.norm = norm() if config.final_norm else None
        self.head = linear(stack.width, config.num_classes, axes=("embed", None), rngs=rngs)

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
        if state is not None:
            raise ValueError(
                "a classifier takes no state; call it on the whole sequence, or its .stack step by step"
            )
        segments = Segments.of(segment_ids)
        x, _ = self.embedding(inputs, segment_ids=segments)
        x, _ = self.stack(x, segment_ids=segments, key=key)
        mask = jnp.ones(x.shape[:2], bool) if segments is None else segments.real
        if self.norm is not None:
            x = self.norm(x, mask=mask, training=key is not None)
        return self.head(pool(x.astype(jnp.float32), mask, self.config.pooling)), None


@functools.cache
def _say_causal(names: tuple[str, ...]) -> None:
    """Logs once that no token of a classifier sees later ones, though a label belongs to the whole sequence."""
    own = [
        name for name in names if name in MIXERS and "bidirectional" in MIXERS[name][0].__dataclass_fields__
    ]
    option = (
        f"the option bidirectional=True of {', '.join(own)}" if own else "mixer='bidirectional', inner='gla'"
    )
    _log.warning(
        "a classifier whose mixers (%s) are all causal: no token sees later ones; where the task is bidirectional, %s "
        "reads in both directions",
        ", ".join(names),
        option,
    )


def pool(x: Float[Array, "b t d"], mask: Bool[Array, "b t"], how: str) -> Float[Array, "b d"]:
    """Returns one vector per row: the mean of its real tokens, the last or the first one; zero if there are none."""
    if how == "mean":
        count = jnp.maximum(mask.sum(1, keepdims=True), 1)
        return select_masked(x, mask).sum(1) / count.astype(x.dtype)
    time = jnp.arange(x.shape[1])[None]
    if how == "last":
        index = jnp.where(mask, time, -1).max(1)
    else:
        index = jnp.where(mask, time, x.shape[1]).min(1)
    picked = jnp.take_along_axis(x, jnp.clip(index, 0, x.shape[1] - 1)[:, None, None], axis=1)[:, 0]
    return jnp.where(mask.any(1)[:, None], picked, 0)
