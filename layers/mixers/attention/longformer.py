"""Longformer: windows, dilated per head, and global tokens with projections of their own (Beltagy et al. 2020, arXiv:2004.05150)."""

import jax.numpy as jnp

from layers.kernels.attention import Mask, Tokens, attention
from layers.options import Count, checked_dataclass
from layers.parts.whole_attention import WholeAttention, WholeAttentionConfig


@checked_dataclass
class LongformerConfig(WholeAttentionConfig):
    """Options of `Longformer`, and those of `WholeAttentionConfig`.

    Attributes:
      window: keys that a token sees on either side; the paper's w is twice that.
      global_tokens: number of first tokens of a sequence that see all tokens and are seen by all.
      dilation: distance between the keys of a window.
      dilated_heads: number of heads, the last ones, whose windows are dilated; all if None.
    """

    window: int = 256
    global_tokens: Count = 1
    dilation: int = 1
    dilated_heads: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dilated_heads is not None and self.dilated_heads > self.heads:
            raise ValueError(f"dilated_heads={self.dilated_heads}; expected at most heads={self.heads}")


class Longformer(WholeAttention):
    """Longformer: a window and a few global tokens (Beltagy et al. 2020, arXiv:2004.05150).

        y_i = W_o softmax_j(q_i . k_j / sqrt(head_dim)) v_j,      j global, or |i - j| in {0, r, 2 r, ..., w r}
        y_i = W_o softmax_j(q'_i . k'_j / sqrt(head_dim)) v'_j,   all j, for global i

    with dilation r, which is 1 in undilated heads; the first g tokens are global, and q', k', v' have projections of their
    own. A global key in the window counts once. Linear in t, and packed rows cost one pass per segment; not causal.
    """

    projections = ("query", "key", "value", "global_query", "global_key", "global_value")

    @staticmethod
    def attend(config, _, heads, lengths):
        q, k, v, *of_globals = heads
        count, tokens = min(config.global_tokens, q.shape[1]), Tokens(kv_lengths=lengths)
        indices = jnp.arange(count, dtype=jnp.int32)[None, None] if count else None
        plain = 0 if config.dilated_heads is None else config.heads - config.dilated_heads
        y = jnp.concatenate(
            [
                attention(
                    *(x[:, :, own] for x in (q, k, v)),
                    mask=Mask(window=config.window, dilation=dilation, global_keys=indices),
                    tokens=tokens,
                )
                for own, dilation in ((slice(plain), 1), (slice(plain, None), config.dilation))
                if q[:, :, own].shape[2]
            ],
            axis=2,
        )
        q, k, v = of_globals
        return jnp.concatenate([attention(q[:, :count], k, v, tokens=tokens), y[:, count:]], axis=1)
