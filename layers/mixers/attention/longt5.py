"""LongT5: a window, and summaries of blocks that every layer makes anew (Guo et al. 2022, arXiv:2112.07916)."""

from typing import Literal

import jax.numpy as jnp
from flax import nnx

from layers.kernels.attention import Logits, Tokens, attention_with_lse, compose
from layers.options import Positive, checked_dataclass
from layers.parameters import NO_DECAY, parameter
from layers.parts.heads import join_heads, split_heads
from layers.parts.neighbours import distances, near_attention
from layers.parts.whole_attention import WholeAttention, WholeAttentionConfig, map_of, mapped
from layers.positions.relative import relative_buckets


@checked_dataclass
class LongT5Config(WholeAttentionConfig):
    """Options of `LongT5`, and those of `WholeAttentionConfig`.

    Attributes:
      radius: largest distance between a token and those that it sees by themselves.
      block: tokens of a block that has a summary.
      attention: "transient_global", or "local", without summaries.
      buckets, max_distance: those of T5's biases, for distances between tokens and between blocks.
      scale: factor of the logits, which T5 leaves out; 1 / sqrt(head_dim) if None.
      epsilon: epsilon of the norm of summaries.
    """

    radius: int = 127
    block: int = 16
    attention: Literal["transient_global", "local"] = "transient_global"
    buckets: int = 32
    max_distance: int = 128
    scale: Positive | None = 1.0
    epsilon: Positive = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.buckets % 4 or self.max_distance <= self.buckets // 4:
            raise ValueError(
                f"buckets={self.buckets}, max_distance={self.max_distance}; expected a multiple of 4, and more than its quarter"
            )


class LongT5(WholeAttention):
    """LongT5: local attention with transient global tokens (Guo et al. 2022, arXiv:2112.07916).

        g_B = s * r / sqrt(mean(r^2) + epsilon),  r = sum_{i in B} x_i,      B the blocks of c tokens
        y_i = W_o softmax over {q_i . k_j + bias(j - i): |j - i| <= radius} and {q_i . W_k g_B + bias'(B - B(i))} of v_j, W_v g_B

    in one softmax. Tokens behind the last whole block belong to it; a sequence of less than one block has no summaries.
    bias and bias' are T5's, in this layer alone. Linear in t but for the t^2 / c products with summaries; packed rows cost one
    pass per segment; not causal.
    """

    def __init__(self, config: LongT5Config, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        small, heads = nnx.initializers.normal(0.02), (None, "heads")
        summaries = config.attention == "transient_global"
        table = (rngs, small, (config.buckets, config.heads))
        self.near_bias = parameter(*table, axes=heads, **NO_DECAY)
        self.far_bias = parameter(*table, axes=heads, **NO_DECAY) if summaries else None
        ones = (rngs, nnx.initializers.ones_init(), (config.width,))
        self.summary_scale = parameter(*ones, axes=("embed",), **NO_DECAY) if summaries else None

    def features(self, x):
        return [*super().features(x), x.astype(self.config.dtype)]

    def weights(self):
        tables = [
            None if one is None else one[...] for one in (self.near_bias, self.far_bias, self.summary_scale)
        ]
        return *tables, [map_of(self.key), map_of(self.value)]

    @staticmethod
    def attend(config, weights, heads, lengths):
        q, k, v, x = heads
        near_bias, far_bias, scale, maps = weights
        bias = _bias(config, near_bias, distances(config.radius))[None]
        near = near_attention(
            q,
            k,
            v,
            radius=config.radius,
            bias=bias,
            lengths=lengths,
            scale=config.scale or q.shape[3] ** -0.5,
        )
        count = q.shape[1] // config.block
        if config.attention == "local" or count == 0:
            return near.output
        whole = jnp.minimum(lengths // config.block, count)
        summaries = _summaries(config, scale, join_heads(x), count, whole).astype(q.dtype)
        side = [split_heads(mapped(summaries, *one), config.heads) for one in maps]
        index = jnp.arange(count, dtype=jnp.int32)[None, None]
        own = jnp.minimum(jnp.arange(q.shape[1], dtype=jnp.int32)[None] // config.block, whole[:, None] - 1)
        far = attention_with_lse(
            *(q, *side),
            logits=Logits(bias=_bias(config, far_bias, index - own[..., None])),
            tokens=Tokens(kv_lengths=whole),
            scale=config.scale,
        )
        return compose(near, far).output


def _bias(config, table, relative):
    """The bias (b, h, q, k) or (h, q, k) of relative positions."""
    buckets = relative_buckets(
        relative, bidirectional=True, buckets=config.buckets, max_distance=config.max_distance
    )
    return jnp.moveaxis(table[buckets], -1, -3)


def _summaries(config, scale, x, count, whole):
    """The normalized sums of the first `count` blocks, of which `whole` exist; the last one takes what is behind it."""
    size = config.block
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, (count + 1) * size - x.shape[1]), (0, 0)))
    sums = x.reshape(x.shape[0], count + 1, size, x.shape[2]).sum(2)
    rest = jnp.take_along_axis(sums, whole[:, None, None], axis=1)
    last = jnp.arange(count, dtype=jnp.int32)[None] == whole[:, None] - 1
    sums = sums[:, :count] + jnp.where(last[..., None], rest, 0)
    return (
        sums
        * jnp.reciprocal(jnp.sqrt(jnp.square(sums).mean(-1, keepdims=True) + config.epsilon))
        * scale[None, None]
    )
