"""Landmark attention: a landmark token after each block opens it (Mohtashami and Jaggi 2023, arXiv:2305.16300)."""

import jax
import jax.numpy as jnp

from layers.kernels.attention import Logits, Tokens, attention
from layers.mixers.attention.patterned import Patterned, refuse_options
from layers.options import checked_dataclass
from layers.parts.attention_config import AttentionConfig
from layers.parts.position_blocks import block_index, some_at_a_time

# Queries whose bias is held at once.
QUERIES = 128


@checked_dataclass
class LandmarkConfig(AttentionConfig):
    """Options of `Landmark`, and those of `AttentionConfig` but for windows, sinks and biases of positions.

    Attributes:
      block: tokens of a block, its landmark included: every token at a position p with p mod block = block - 1 is one. A
        model's data must have landmark tokens there.
    """

    block: int = 51

    fixed = ("window", "causal", "sink_logits", "logit_cap")

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_options(self, "landmark")
        if self.block < 2:
            raise ValueError(f"block={self.block}; expected at least 2, a token and its landmark")


class Landmark(Patterned):
    """Landmark attention: grouped softmax (Mohtashami and Jaggi 2023, arXiv:2305.16300).

        a_ij = q_i . k_j / sqrt(head_dim);   own_i: tokens j <= i of the block of i but no landmark, and landmarks of earlier blocks
        p_ij = softmax_{own_i}(a_ij)                                      tokens of the block of i
        p_ij = softmax_{own_i}(a_il) softmax_{block of j}(a_ij)           tokens of an earlier block with landmark l

    and y_i = W_o sum_j p_ij v_j; a landmark has no weight of its own. It is one softmax with the bias a_il - logsumexp_block(a_ij)
    on the tokens of earlier blocks. Quadratic in t, some queries at a time. The cache holds all keys.
    """

    def attend(self, q, entries, here, there, given):
        config, (k, v) = self.config, entries
        scale = q.shape[3] ** -0.5 if config.scale is None else config.scale

        def attend(q, q_numbers, q_positions):
            return attention(
                *(q, k, v),
                causal=True,
                logits=Logits(bias=_bias(q, k, (q_numbers, q_positions), there, config.block, scale)),
                segment_ids=q_numbers,
                tokens=Tokens(there[0], q_positions, there[1]),
                scale=scale,
            )

        return some_at_a_time(attend, QUERIES, q, *here)


def _bias(q, k, here, there, size, scale):
    """The bias (b, h, t, s) that makes attention grouped; -inf hides landmarks, and NaN marks one that is not finite."""
    (b, t, h, width), (s, groups) = q.shape, k.shape[1:3]
    (q_numbers, q_positions), (numbers, positions) = here, there
    fit = jnp.isfinite(k).all((2, 3))
    # What is not finite is left out here, through whose derivatives it would reach every query.
    q, k = (jnp.where(jnp.isfinite(x), x, 0).astype(jnp.float32) for x in (q, k))
    q = q.reshape(b, t, groups, h // groups, width)
    a = scale * jnp.einsum("btgrk,bsgk->bsgrt", q, k, precision=jax.lax.Precision.HIGHEST)
    places, landmark = positions // size, positions % size == size - 1
    index = block_index(numbers, places)

    def each(x):
        """Numbers (b, s) beside the logits."""
        return x[:, :, None, None, None]

    def joined(join, x):
        """`join` of x (b, s, ...) over the keys of each block, at every key of it."""
        return jax.vmap(lambda x, index: join(x, index, s + 1)[index])(x, index)

    top = jax.lax.stop_gradient(joined(jax.ops.segment_max, jnp.where(each(landmark), -jnp.inf, a)))
    top = jnp.where(top == -jnp.inf, 0, top)
    total = joined(
        jax.ops.segment_sum, jnp.where(each(landmark), 0, jnp.exp(jnp.where(each(landmark), 0, a - top)))
    )
    of_landmark = joined(jax.ops.segment_sum, jnp.where(each(landmark), a, 0))
    spoiled = joined(jax.ops.segment_max, (landmark & ~fit).astype(jnp.int32)) > 0
    bias = of_landmark - top - jnp.log(jnp.where(total > 0, total, 1))
    bias = jnp.moveaxis(jnp.where(each(spoiled), jnp.nan, bias).reshape(b, s, h, t), (1, 2), (3, 1))
    earlier = (numbers[:, None] == q_numbers[..., None]) & (
        places[:, None] < (q_positions // size)[..., None]
    )
    return jnp.where(landmark[:, None, None], -jnp.inf, jnp.where(earlier[:, None], bias, 0))
