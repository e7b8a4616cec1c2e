"""Informer: attention for the few queries that attend to something (Zhou et al. 2021, arXiv:2012.07436)."""

import math

import jax
import jax.numpy as jnp

from layers.kernels.attention import Tokens, attention
from layers.options import checked_dataclass
from layers.parts.each_segment import is_within
from layers.parts.whole_attention import DrawnAttention, DrawnAttentionConfig


@checked_dataclass
class InformerConfig(DrawnAttentionConfig):
    """Options of `Informer`, and those of `DrawnAttentionConfig`.

    Attributes:
      factor: c; ceil(c ln t) queries are active, and as many keys sampled per query, t at most.
    """

    factor: int = 5


class Informer(DrawnAttention):
    """Informer: ProbSparse self-attention of the encoder (Zhou et al. 2021, arXiv:2012.07436).

        M_i = max_{j in S_i} q_i . k_j - sum_{j in S_i} q_i . k_j / t,   S_i: min(t, ceil(c ln t)) keys drawn with replacement
        y_i = W_o softmax_j(q_i . k_j / sqrt(head_dim)) v_j for the queries of the largest M_i, as many, per head
        y_i = W_o mean_j v_j                                              for the others

    The sum is divided by t, as in the released code. There S_i is drawn anew in every call; here it depends on the token's
    position and the layer alone, so that outputs are a function of the input. The choice has no gradient. t ln t products;
    packed rows cost one pass per segment; not causal.
    """

    @staticmethod
    def attend(config, weights, heads, lengths):
        q, k, v = heads
        b, t, h, _ = q.shape
        most = min(t, max(1, math.ceil(config.factor * math.log(t))))
        table = [min(n, max(1, math.ceil(config.factor * math.log(max(n, 1))))) for n in range(t + 1)]
        count = jnp.asarray(table, jnp.int32)[lengths]
        keys = sampled_keys(weights, most, t, lengths)
        measure = jax.lax.stop_gradient(_measure(q, k, keys, count, lengths))
        real = is_within(lengths, t)
        ranked, active = jax.lax.top_k(jnp.where(real[:, None], jnp.swapaxes(measure, 1, 2), -jnp.inf), most)
        taken = (jnp.arange(most, dtype=jnp.int32)[None] < count[:, None])[:, None] & (ranked > -jnp.inf)
        queries = jnp.take_along_axis(jnp.swapaxes(q, 1, 2), active[..., None], axis=2)
        rows = attention(jnp.swapaxes(queries, 1, 2), k, v, tokens=Tokens(kv_lengths=lengths))
        mean = jnp.where(real[..., None, None], v.astype(jnp.float32), 0).sum(1) / lengths[
            :, None, None
        ].astype(jnp.float32)
        y = jnp.broadcast_to(mean[:, :, None], (b, h, t, v.shape[3])).astype(v.dtype)
        row, head = (
            jnp.arange(n, dtype=jnp.int32).reshape(shape) for n, shape in ((b, (-1, 1, 1)), (h, (1, -1, 1)))
        )
        y = y.at[row, head, jnp.where(taken, active, t)].set(jnp.swapaxes(rows, 1, 2), mode="drop")
        return jnp.swapaxes(y, 1, 2)


def sampled_keys(seed: jax.Array, samples: int, time: int, lengths: jax.Array) -> jax.Array:
    """Returns the indices (b, samples, t) of the keys that each query is measured by, uniform below the lengths."""
    key = jax.random.fold_in(jax.random.key(1), seed.astype(jnp.int32))

    def number(sample, query):
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, sample), query), (), jnp.float32)

    numbers = jax.vmap(jax.vmap(number, (None, 0)), (0, None))(
        jnp.arange(samples, dtype=jnp.int32), jnp.arange(time, dtype=jnp.int32)
    )
    drawn = (numbers[None] * lengths[:, None, None].astype(jnp.float32)).astype(jnp.int32)
    return jnp.minimum(drawn, lengths[:, None, None] - 1)


def _measure(q, k, keys, count, lengths):
    """M (b, t, h), one sample of every query at a time."""

    def add(carry, one):
        most, total = carry
        index, sample = one
        there = jnp.take_along_axis(k, index[..., None, None], axis=1)
        product = jnp.einsum("bthk,bthk->bth", q, there, preferred_element_type=jnp.float32)
        used = (sample < count)[:, None, None]
        return (
            jnp.where(used, jnp.maximum(most, product), most),
            jnp.where(used, total + product, total),
        ), None

    start = jnp.full_like(q, -jnp.inf, jnp.float32, shape=q.shape[:3])
    samples = jnp.arange(keys.shape[1], dtype=jnp.int32)
    (most, total), _ = jax.lax.scan(add, (start, jnp.zeros_like(start)), (jnp.swapaxes(keys, 0, 1), samples))
    return most - total / lengths[:, None, None].astype(jnp.float32)
