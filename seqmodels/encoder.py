"""An encoder of whole sequences: a backbone, and one vector per row."""

import functools
import logging

import jax.numpy as jnp
from flax import nnx

from layers.mixers import MIXERS
from layers.segments import Segments, select_masked
from layers.typing import Array, Bool, Float, Key, Num
from seqmodels.backbone import Backbone
from seqmodels.config import ClassifierConfig, DualEncoderConfig

_log = logging.getLogger(__name__)


class Encoder(Backbone):
    """What a `Classifier` and a `DualEncoder` share: all but the head."""

    def __init__(self, config: ClassifierConfig | DualEncoderConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        stack = config.stack
        if self.stack.causal:
            _say_causal(tuple(dict.fromkeys(stack.mixer_of(layer)[0] for layer in range(stack.depth))))

    def encode(
        self,
        inputs: Num[Array, "b t *c"],
        *,
        segments: Segments | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b d"]:
        """Returns one float32 vector per row; arguments are those of `features`."""
        x = self.features(inputs, segments, key=key)
        mask = jnp.ones(x.shape[:2], bool) if segments is None else segments.real
        return pool(x.astype(jnp.float32), mask, self.config.pooling)


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
