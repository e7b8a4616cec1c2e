"""BigBird: blocks of a window, first and last blocks, and random blocks (Zaheer et al. 2020, arXiv:2007.14062)."""

import jax
import jax.numpy as jnp

from layers.kernels.attention import Mask, Tokens, attention
from layers.options import Count, checked_dataclass
from layers.parts.whole_attention import DrawnAttention, DrawnAttentionConfig
from layers.typing import Array, Int


@checked_dataclass
class BigBirdConfig(DrawnAttentionConfig):
    """Options of `BigBird`, and those of `DrawnAttentionConfig`.

    Attributes:
      block: tokens in a block.
      random_blocks: random blocks that a block sees, besides the first, the last, its own and its two neighbours.
    """

    block: int = 64
    random_blocks: Count = 3


class BigBird(DrawnAttention):
    """BigBird, internal construction: window, global and random blocks (Zaheer et al. 2020, arXiv:2007.14062).

        y_i = W_o softmax_j(q_i . k_j / sqrt(head_dim)) v_j,   j in the blocks {0, n-1, I-1, I, I+1} or r random others

    for token i of block I of n; tokens of the blocks 0 and n-1 see everything. A head draws its random blocks from the seed
    `layer`, uniformly without replacement, so that a model evaluates what it was trained with; a sequence keeps its draw
    whatever stands behind it. Linear in t, and packed rows cost one pass per segment; not causal.
    """

    @staticmethod
    def attend(config, weights, heads, lengths):
        q, k, v = heads
        size, blocks = config.block, -(-q.shape[1] // config.block)
        count = -(-lengths // size)
        lists = block_plan(config, weights, blocks, count)
        offsets = jnp.arange(size, dtype=jnp.int32)[None]
        ends = jnp.concatenate(
            [jnp.broadcast_to(offsets, (q.shape[0], size)), (count[:, None] - 1) * size + offsets], 1
        )
        ends = jnp.where(ends < lengths[:, None], ends, -1)
        mask = Mask(block_indices=lists, block_size=size, global_keys=ends[:, None], global_queries=ends)
        return attention(q, k, v, mask=mask, tokens=Tokens(kv_lengths=lengths))


def block_plan(
    config: BigBirdConfig, seed: Array, blocks: int, count: Int[Array, "b"]
) -> Int[Array, "b h n listed"]:
    """Returns the window and the random blocks of each of `blocks` blocks, in sequences of `count` blocks.

    A block draws the random ones with the smallest of independent random numbers, one per head and pair of blocks. -1 stands
    where fewer than `random_blocks` are left.
    """
    key = jax.random.fold_in(jax.random.key(0), seed.astype(jnp.int32))
    index = jnp.arange(blocks, dtype=jnp.int32)

    def number(head, row, column):
        own = key
        for part in (head, row, column):
            own = jax.random.fold_in(own, part)
        return jax.random.uniform(own, (), jnp.float32)

    numbers = jax.vmap(jax.vmap(jax.vmap(number, (None, None, 0)), (None, 0, None)), (0, None, None))(
        jnp.arange(config.heads, dtype=jnp.int32), index, index
    )
    row, column, count = index[:, None], index[None], count[:, None, None]
    near = jnp.abs(row - column) <= 1
    left = ~near[None] & (column[None] > 0) & (column[None] < count - 1)
    picked = min(config.random_blocks, blocks)
    ranked, random = jax.lax.top_k(jnp.where(left[:, None], 1 - numbers[None], 0), picked)
    random = jnp.where(ranked > 0, random, -1)
    window = jnp.broadcast_to(row + jnp.arange(-1, 2, dtype=jnp.int32)[None], (*random.shape[:3], 3))
    return jnp.concatenate([window, random], axis=3)
