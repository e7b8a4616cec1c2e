"""Transformer-XL: relative positions in two terms, and a memory of earlier tokens (Dai et al. 2019, arXiv:1901.02860)."""

import jax
import jax.numpy as jnp
from flax import nnx

from layers.kernels.attention import Logits, Mask, Tokens, attention
from layers.mixers.attention.patterned import Patterned, refuse_options
from layers.options import checked_dataclass
from layers.parameters import NO_DECAY, linear, parameter
from layers.parts.attention_config import AttentionConfig
from layers.parts.heads import split_heads
from layers.parts.position_blocks import some_at_a_time
from layers.positions import sinusoidal
from layers.positions.position import NoPosition

# Queries whose relative positions are held at once.
QUERIES = 128


@checked_dataclass
class TransformerXLConfig(AttentionConfig):
    """Options of `TransformerXL`, and those of `AttentionConfig` but for sinks, caps and positions.

    `window` is the length of the memory, the token's own place included. The paper trains on segments with a memory of as many
    tokens; a window is its evaluation with `same_length`, in which each token sees equally many.

    Attributes:
      max_distance: larger distances count as this one ("clamp_len"); None for none.
    """

    position: str = "none"
    max_distance: int | None = None

    fixed = ("causal", "sink_tokens", "sink_logits", "logit_cap")

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_options(self, "transformer_xl", positions=(NoPosition,))


class TransformerXL(Patterned):
    """Attention with relative positions in two terms (Dai et al. 2019, arXiv:1901.02860).

        a_ij = ((q_i + u) . k_j + (q_i + v) . W_r p_{i-j}) / sqrt(head_dim),   j <= i,  i - j < window
        y_i  = W_o sum_j softmax_j(a_ij) v_j

    with sinusoids p of the distance and one u, v per head and layer. The released code orders sines and cosines otherwise, which
    is an order of the columns of W_r, and may share u and v among layers. Quadratic in t, some queries at a time. The cache holds
    keys and values without positions, of the window or of all tokens.
    """

    def __init__(self, config: TransformerXLConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        size, options = config.heads * config.size, {"dtype": config.dtype, "rngs": rngs}
        self.relative = linear(config.width, size, axes=("embed", "heads"), bias=False, **options)
        small, by_head = nnx.initializers.normal(0.02), {"axes": ("heads", None), **NO_DECAY}
        self.content_bias = parameter(rngs, small, (config.heads, config.size), **by_head)
        self.position_bias = parameter(rngs, small, (config.heads, config.size), **by_head)

    def attend(self, q, entries, here, there, given):
        config, (k, v), (numbers, positions) = self.config, entries, there
        scale = config.size**-0.5 if config.scale is None else config.scale
        # Every distance that is seen is below the window, or the number of keys.
        count = k.shape[1] if config.window is None else config.window
        count = count if config.max_distance is None else min(count, config.max_distance + 1)
        places = sinusoidal(jnp.arange(count)[None], config.width).astype(config.dtype)
        r = split_heads(self.relative(places), config.heads)[0].astype(jnp.float32)
        content = (q + self.content_bias[...][None, None]).astype(q.dtype)

        def attend(q, content, q_numbers, q_positions):
            # What is not finite is left out here, through whose derivatives it would reach the table.
            q = jnp.where(jnp.isfinite(q), q, 0).astype(jnp.float32) + self.position_bias[...][None, None]
            by_distance = jnp.einsum("bthk,chk->bhtc", q, r, precision=jax.lax.Precision.HIGHEST)
            distance = jnp.clip(q_positions[:, :, None] - positions[:, None], 0, count - 1)
            bias = scale * jnp.take_along_axis(by_distance, distance[:, None], axis=3)
            return attention(
                *(content, k, v),
                causal=True,
                mask=Mask(window=config.window),
                logits=Logits(bias=bias),
                segment_ids=q_numbers,
                tokens=Tokens(numbers, q_positions, positions),
                scale=scale,
            )

        return some_at_a_time(attend, QUERIES, q, content, *here)
