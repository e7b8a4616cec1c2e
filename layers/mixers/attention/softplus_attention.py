"""Softplus attention with re-weighting: LSSA and LSSAR (Gao and Spratling 2025, arXiv:2501.13428)."""

import math

import jax
import jax.numpy as jnp

from layers.kernels.attention import Logits, Tokens, attention
from layers.mixers.attention.patterned import Patterned, refuse_options
from layers.options import NonNegative, Positive, checked_dataclass
from layers.parts.attention_config import AttentionConfig
from layers.parts.position_blocks import some_at_a_time

# Queries whose weights are held at once.
QUERIES = 128


@checked_dataclass
class SoftplusAttentionConfig(AttentionConfig):
    """Options of `SoftplusAttention`, and those of `AttentionConfig` but for windows, sinks, scales, caps and biases of positions.

    Attributes:
      power: p, the power of the re-weighting; with 1 and offset=0 there is none, which is LSSA.
      offset: o, what is subtracted before it from weights whose mean is 1.
    """

    power: Positive = 15.0
    offset: NonNegative = 1.0

    fixed = ("window", "causal", "sink_logits", "logit_cap", "scale")

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_options(self, "softplus_attention")


class SoftplusAttention(Patterned):
    """Softplus attention with re-weighting (Gao and Spratling 2025, arXiv:2501.13428).

        b_ij = softplus(log(e) log(n_i) / sqrt(e) q_i . k_j),   a_ij = b_ij / sum_j b_ij             j <= i
        c_ij = relu(n_i a_ij - o)^p,   y_i = W_o sum_j c_ij v_j / sum_j c_ij

    with e = head_dim and n_i the number of tokens that i sees. Where no a_ij is above o / n_i, as in every row of equal weights,
    the a_ij are the weights. This and the default o = 1, the mean of n_i a_ij, are our reading of the abstract. The power is
    taken of c_ij divided by the largest of its row, so that no number overflows. Quadratic in t, some queries at a time. The
    cache holds all keys.
    """

    def attend(self, q, entries, here, there, given):
        config, (k, v) = self.config, entries

        def attend(q, q_numbers, q_positions):
            weights = _log_weights(q, k, (q_numbers, q_positions), there, config.power, config.offset)
            # The softmax of logarithms of weights divides the weights by their sum.
            return attention(
                *(q, k, v),
                causal=True,
                scale=0.0,
                logits=Logits(bias=weights),
                segment_ids=q_numbers,
                tokens=Tokens(there[0], q_positions, there[1]),
            )

        return some_at_a_time(attend, QUERIES, q, *here)


def _log_weights(q, k, here, there, power, offset):
    """The logarithms of weights (b, h, t, s), but for a number per query; -inf where a weight is zero."""
    (b, t, h, width), (s, groups) = q.shape, k.shape[1:3]
    (q_numbers, q_positions), (numbers, positions) = here, there
    # What is not finite is left out here, through whose derivatives it would reach every query.
    q, k = (jnp.where(jnp.isfinite(x), x, 0).astype(jnp.float32) for x in (q, k))
    count = (q_positions + 1).astype(jnp.float32)[:, None, :, None]
    q = q.reshape(b, t, groups, h // groups, width)
    a = jnp.einsum("btgrk,bsgk->bgrts", q, k, precision=jax.lax.Precision.HIGHEST).reshape(b, h, t, s)
    b_ij = jax.nn.softplus(math.log(width) / math.sqrt(width) * jnp.log(count) * a)
    seen = (numbers[:, None] == q_numbers[..., None]) & (positions[:, None] <= q_positions[..., None])
    b_ij = jnp.where(seen[:, None], b_ij, 0)
    total = b_ij.sum(3, keepdims=True)
    mean_one = count * b_ij / jnp.where(total > 0, total, 1)
    above = jax.nn.relu(mean_one - offset)
    # A factor of a whole row changes no output, and the derivative of a maximum is a search for it.
    largest = jax.lax.stop_gradient(above.max(3, keepdims=True, initial=0))
    some = largest > 0
    above = jnp.where(some, above / jnp.where(some, largest, 1), mean_one)
    logs = jnp.log(jnp.where(above > 0, above, 1))
    return jnp.where(above > 0, jnp.where(some, power, 1.0) * logs, -jnp.inf)
