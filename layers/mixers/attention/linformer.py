"""Linformer: attention over a fixed number of mixtures of keys and values (Wang et al. 2020, arXiv:2006.04768)."""

import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from layers.mixer import Mixer
from layers.options import ActivationDtype, checked_dataclass
from layers.parameters import linear, parameter
from layers.parts.each_segment import mix_each_segment
from layers.parts.heads import join_heads, split_heads
from layers.segments import Segments
from layers.typing import Array, Float

# Xavier with gain 1 / sqrt(2), as in the authors' code for all matrices of the layer.
_projection = nnx.initializers.variance_scaling(
    0.5, "fan_avg", "uniform", in_axis=-1, out_axis=-2, batch_axis=(0,)
)


@checked_dataclass
class LinformerConfig:
    """Options of `Linformer`.

    Attributes:
      width: d, number of input and output features.
      max_length: T, length of the longest sequence. A longer input raises an error, or gives NaN where only its
        segment_ids tell the length.
      projected: n, number of mixtures of keys and of values.
      heads: h, number of heads.
      sharing: projections along time that are shared: "none", "heads" (E for all heads, F for all heads), or
        "key_value" (one E for all heads, keys and values).
      bias: whether the projections of features have biases.
      dtype: dtype of the activations.
    """

    width: int
    max_length: int
    projected: int = 256
    heads: int = 8
    sharing: Literal["none", "heads", "key_value"] = "heads"
    bias: bool = False
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width={self.width}")


class Linformer(Mixer):
    """Linformer: attention with keys and values projected along time (Wang et al. 2020, arXiv:2006.04768).

        q, k, v = W_q x, W_k x, W_v x;  y = W_o softmax(q (E k)^T / sqrt(head_dim)) (F v)

    with E and F (n x T) per head. A sequence of t < T tokens uses the first t columns. Linear in t, not causal.
    """

    patterns = ("noncausal_self",)
    causal = False

    def __init__(self, config: LinformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        options = {"axes": ("embed", "heads"), "bias": config.bias, "dtype": config.dtype, "rngs": rngs}
        self.query = linear(config.width, config.width, **options)
        self.key = linear(config.width, config.width, **options)
        self.value = linear(config.width, config.width, **options)
        self.output = linear(config.width, config.width, **options | {"axes": ("heads", "embed")})
        heads, axis = (config.heads, "heads") if config.sharing == "none" else (1, None)
        self.projections = nnx.List(
            parameter(
                rngs, _projection, (heads, config.projected, config.max_length), axes=(axis, None, None)
            )
            for _ in range(1 if config.sharing == "key_value" else 2)
        )

    def mix(
        self, x: Float[Array, "b t d"], carried: None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], None]:
        config = self.config
        if segments is None and x.shape[1] > config.max_length:
            raise ValueError(
                f"x has {x.shape[1]} tokens; Linformer was made for max_length={config.max_length}"
            )
        qkv = jnp.concatenate([self.query(x), self.key(x), self.value(x)], axis=-1)
        projections = [p[...] for p in self.projections]
        y = mix_each_segment(partial(_attend, config), projections, qkv, segment_ids=segments)
        return self.output(y), None


def _attend(config, projections, qkv, lengths):
    """Returns attention within sequences that are zero from their lengths on."""
    t = qkv.shape[1]
    q, k, v = (split_heads(part, config.heads) for part in jnp.split(qkv, 3, axis=-1))
    missing = max(0, t - config.max_length)
    used = [jnp.pad(p[..., :t], ((0, 0), (0, 0), (0, missing))).astype(qkv.dtype) for p in projections]
    k, v = (_mixtures(p, part) for p, part in zip((used[0], used[-1]), (k, v), strict=True))
    logits = jnp.einsum("bthk,bnhk->bhtn", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits / math.sqrt(q.shape[-1]), axis=-1).astype(qkv.dtype)
    y = join_heads(jnp.einsum("bhtn,bnhk->bthk", weights, v))
    return jnp.where((lengths > config.max_length)[:, None, None], jnp.nan, y)


def _mixtures(projection, x):
    """Returns (h or 1, n, t) times (b, t, h, k), summed in float32."""
    if projection.shape[0] == 1:
        y = jnp.einsum("nt,bthk->bnhk", projection[0], x, preferred_element_type=jnp.float32)
    else:
        y = jnp.einsum("hnt,bthk->bnhk", projection, x, preferred_element_type=jnp.float32)
    return y.astype(x.dtype)
