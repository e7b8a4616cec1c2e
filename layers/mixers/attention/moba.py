"""MoBA: every query attends to the blocks whose mean key it likes best (Lu et al. 2025, arXiv:2502.13189)."""

import jax
import jax.numpy as jnp

from layers.kernels.attention import Logits, Mask, Tokens, attention
from layers.mixers.attention.patterned import Patterned, refuse_options
from layers.options import checked_dataclass
from layers.parts.attention_config import AttentionConfig
from layers.parts.position_blocks import block_means, row_block_means, some_at_a_time

# Queries whose choice is held as a mask at once, where rows are packed or cached.
QUERIES = 128


@checked_dataclass
class MoBAConfig(AttentionConfig):
    """Options of `MoBA`, and those of `AttentionConfig` but for windows, sinks and biases of positions.

    Attributes:
      block: tokens in a block.
      top_k: blocks that a query sees, its own included.
    """

    block: int = 512
    top_k: int = 3

    fixed = ("window", "causal", "sink_logits")

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_options(self, "moba")


class MoBA(Patterned):
    """MoBA: mixture of block attention (Lu et al. 2025, arXiv:2502.13189).

        s_ib = q_i . mean_{j in b} k_j,   b before the block of i
        y_i  = W_o softmax_j(q_i . k_j / sqrt(head_dim)) v_j,   j <= i in the block of i, or in one of the top_k - 1 largest s_ib

    per head, with rotated q and k, and no gradient through the choice. Blocks are by position, so that all but the last are
    whole. Products grow with t top_k block and t^2 / block; with packed rows and with a cache, which holds all keys, the choice
    is a mask over all of them.
    """

    def attend(self, q, entries, here, there, given):
        k, v = entries
        options = {"causal": True, "scale": self.config.scale}
        if given is not None:
            return self._masked(q, k, v, here, there, options)
        mask = Mask(block_indices=self._lists(q, k), block_size=self.config.block, query_block_size=1)
        return attention(q, k, v, mask=mask, logits=self.logits(), **options)

    def _lists(self, q, k):
        """The blocks that every query of whole rows sees, (b, h, t, top_k): its own, and -1 where there are too few."""
        (b, t, h, _), size = q.shape, self.config.block
        count = -(-t // size)
        own = jnp.arange(t, dtype=jnp.int32) // size
        earlier = jnp.arange(count, dtype=jnp.int32)[None] < own[:, None]
        chosen = _best(q, row_block_means(k, size), earlier[None, None], self.config.top_k - 1)
        own = jnp.broadcast_to(own[None, None, :, None], (b, h, t, 1))
        return jnp.concatenate([own, chosen], axis=3)

    def _masked(self, q, k, v, here, there, options):
        """Outputs where blocks are told by segment and position, some queries at a time."""
        config = self.config
        numbers, positions = there
        index, (means,), blocks = block_means(numbers, positions // config.block, k)

        def attend(q, q_numbers, q_positions):
            block_numbers, block_places = blocks
            own = q_positions // config.block
            earlier = (block_numbers[:, None] == q_numbers[..., None]) & (
                block_places[:, None] < own[..., None]
            )
            chosen = _best(q, means, earlier[:, None], config.top_k - 1)
            seen = (chosen[..., None, :] == index[:, None, None, :, None]).any(-1)
            seen |= (positions // config.block)[:, None, None] == own[:, None, :, None]
            return attention(
                *(q, k, v),
                logits=Logits(bias=jnp.where(seen, 0.0, -jnp.inf), logit_cap=config.logit_cap),
                segment_ids=q_numbers,
                tokens=Tokens(numbers, q_positions, positions),
                **options,
            )

        return some_at_a_time(attend, QUERIES, q, *here)


def _best(q, means, allowed, count):
    """The `count` blocks of the largest products of queries (b, t, h, k) and means (b, n, g, k), or -1; (b, h, t, count)."""
    b, t, h, width = q.shape
    grouped = q.reshape(b, t, means.shape[2], h // means.shape[2], width).astype(jnp.float32)
    scores = jnp.einsum("btgrk,bngk->bgrtn", grouped, means, precision=jax.lax.Precision.HIGHEST)
    scores = jax.lax.stop_gradient(scores.reshape(b, h, t, means.shape[1]))
    ranked, best = jax.lax.top_k(jnp.where(allowed, scores, -jnp.inf), min(count, means.shape[1]))
    return jnp.where(ranked > -jnp.inf, best, -1)
