"""What attention that needs a whole sequence at once shares: projections to heads, and segments one by one."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx

from layers.mixer import Mixer
from layers.options import ActivationDtype, Count, checked_dataclass
from layers.parameters import Constant, Linear, linear
from layers.parts.each_segment import mix_each_segment
from layers.parts.heads import join_heads, split_heads
from layers.segments import Segments
from layers.typing import Array, Float, Int

Heads = Float[Array, "b t h k"]


@checked_dataclass
class WholeAttentionConfig:
    """Options of every mixer that is a `WholeAttention`.

    Attributes:
      width: d, number of input and output features.
      heads: h, number of heads.
      bias: whether the projections of features have biases.
      dtype: dtype of the activations.
    """

    width: int
    heads: int = 8
    bias: bool = False
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width={self.width}")


class WholeAttention(Mixer):
    """Base class of attention that is not causal: y = W_o attend(W_q x, W_k x, W_v x), for each segment by itself.

    A mixer sets `projections`, names of the linear maps of x to the heads that `attend` takes, and defines

        attend(config, weights, heads, lengths)    static; outputs (b, t, h, k) of sequences that end at their lengths (b), where
                                                   what stands at `lengths` and beyond is zero and is seen by nobody
        weights()                                  what `attend` reads besides, floating arrays; none by default
    """

    patterns = ("noncausal_self",)
    causal = False
    projections: Sequence[str] = ("query", "key", "value")

    def __init__(self, config: WholeAttentionConfig, *, rngs: nnx.Rngs):
        self.config = config
        options = {"axes": ("embed", "heads"), "bias": config.bias, "dtype": config.dtype, "rngs": rngs}
        for name in self.projections:
            setattr(self, name, linear(config.width, config.width, **options))
        self.output = linear(config.width, config.width, **options | {"axes": ("heads", "embed")})

    def features(self, x: Float[Array, "b t d"]) -> list[Float[Array, "b t f"]]:
        """Returns what `attend` takes by heads: the projections of x."""
        return [getattr(self, name)(x) for name in self.projections]

    def finish(self, y: Float[Array, "b t d"], positions: Int[Array, "#b t"]) -> Float[Array, "b t d"]:
        """Returns the mixer's output, given the joined heads and the positions of the tokens in their sequences."""
        return self.output(y)

    def weights(self) -> Any:
        """Returns floating arrays that `attend` reads."""
        return ()

    def mix(
        self, x: Float[Array, "b t d"], carried: None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], None]:
        if x.shape[1] == 0:
            return jnp.zeros_like(x, self.config.dtype), None
        features = self.features(x)
        run = partial(_attend, type(self).attend, self.config, len(features))
        y = mix_each_segment(run, self.weights(), jnp.concatenate(features, axis=-1), segment_ids=segments)
        positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None] if segments is None else segments.positions
        return self.finish(y, positions), None


@checked_dataclass
class DrawnAttentionConfig(WholeAttentionConfig):
    """Options of every mixer that is a `DrawnAttention`.

    Attributes:
      layer: index of the layer, from 0; layers draw differently, and the same in training and evaluation.
    """

    layer: Count = 0


class DrawnAttention(WholeAttention):
    """Base class of `WholeAttention` with random choices, which `attend` draws from the seed that its weights are: `layer`."""

    def __init__(self, config: DrawnAttentionConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.seed = Constant(jnp.asarray(config.layer, jnp.float32))

    def weights(self):
        return self.seed[...]


def map_of(linear: Linear) -> tuple[Array, Array | None]:
    """Returns the kernel and the bias of a linear map, which `attend` may read as weights and apply by `mapped`."""
    return linear.matrix, None if linear.bias is None else linear.bias[...]


def mapped(x: Float[Array, "b t d"], kernel: Array, bias: Array | None) -> Float[Array, "b t f"]:
    """Returns x W + b in the type of x."""
    y = x @ kernel.astype(x.dtype)
    return y if bias is None else y + bias.astype(x.dtype)[None, None]


def _attend(attend, config, count, weights, features, lengths):
    heads = [split_heads(part, config.heads) for part in jnp.split(features, count, axis=-1)]
    return join_heads(attend(config, weights, heads, lengths)).astype(features.dtype)
