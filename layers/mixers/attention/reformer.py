"""Reformer: attention among tokens that hash alike (Kitaev et al. 2020, arXiv:2001.04451)."""

import jax
import jax.numpy as jnp
from flax import nnx

from layers.kernels.attention import Logits, Piece, Tokens, attention_with_lse, compose
from layers.options import checked_dataclass
from layers.parameters import Constant
from layers.parts.whole_attention import WholeAttention, WholeAttentionConfig

# The logit of a token for itself, which counts only where it sees nothing else.
ITSELF = -1e5


@checked_dataclass
class ReformerConfig(WholeAttentionConfig):
    """Options of `Reformer`, and those of `WholeAttentionConfig`.

    Attributes:
      chunk: m, tokens of a chunk in the order of buckets.
      buckets: number of buckets, even; about 2 t / m serves sequences of t tokens.
      rounds: number of hashes.
      epsilon: epsilon of the norm of keys.
    """

    chunk: int = 64
    buckets: int = 64
    rounds: int = 1
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.buckets % 2:
            raise ValueError(f"buckets={self.buckets}; expected an even number")


class Reformer(WholeAttention):
    """Reformer: attention by locality-sensitive hashing (Kitaev et al. 2020, arXiv:2001.04451).

        q = W_q x,  k_j = q_j / sqrt(mean(q_j^2) + epsilon),  v = W_v x
        b_i = argmax [R q_i; -R q_i],   R (buckets / 2 x head_dim) drawn once per head and round
        a_ij = q_i . k_j / sqrt(head_dim) for j in the chunk of i or in the one before it, i itself where there is nothing else

    Chunks hold m tokens in the order of (b_i, i), and the chunk before the first one is the last. The softmax is one over the
    keys of all rounds, in which a key counts once per round that finds it, as in the released code, which however joins
    rounds end to end before it looks back. The hashes are fixed
    numbers beside the parameters, and have no gradient. t m products per round; packed rows cost one pass per segment. Which
    tokens share a chunk depends on later ones, so that it is not causal. The paper's reversible layers are no part of it.
    """

    projections = ("query", "value")

    def __init__(self, config: ReformerConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        shape = (config.rounds, config.heads, config.width // config.heads, config.buckets // 2)
        self.rotations = Constant(jax.random.normal(rngs.params(), shape, jnp.float32))

    def weights(self):
        return self.rotations[...]

    @staticmethod
    def attend(config, weights, heads, lengths):
        q, v = heads
        wide = q.astype(jnp.float32)
        norm = jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + config.epsilon)
        k = (wide * norm).astype(q.dtype)
        (b, t, h, _), size = q.shape, min(config.chunk, q.shape[1])
        q, k, v = (jnp.swapaxes(x, 1, 2).reshape(b * h, t, x.shape[3]) for x in (q, k, v))
        lengths = jnp.repeat(lengths, h)
        pieces = []
        for rotations in weights:
            products = jnp.einsum(
                "bhtk,hkn->bhtn",
                jax.lax.stop_gradient(q.reshape(b, h, t, q.shape[2])).astype(jnp.float32),
                rotations,
                precision=jax.lax.Precision.HIGHEST,
            ).reshape(b * h, t, config.buckets // 2)
            bucket = jnp.argmax(jnp.concatenate([products, -products], axis=2), axis=2).astype(jnp.int32)
            # What is no token comes last.
            real = jnp.arange(t, dtype=jnp.int32)[None] < lengths[:, None]
            order = jnp.argsort(jnp.where(real, bucket, config.buckets), axis=1, stable=True).astype(
                jnp.int32
            )
            pieces.append(_in_chunks(q, k, v, order, lengths, size))
        while len(pieces) > 1:
            pieces = [compose(pieces[0], pieces[1]), *pieces[2:]]
        return jnp.swapaxes(pieces[0].output.reshape(b, h, t, v.shape[2]), 1, 2)


def _in_chunks(q, k, v, order, lengths, size) -> Piece:
    """Attention of sequences (n, t, k) within chunks of an order (n, t), each with the chunk before it."""
    (n, t), count = order.shape, -(-order.shape[1] // size)
    order = jnp.pad(order, ((0, 0), (0, count * size - t)), constant_values=t - 1)
    real = jnp.arange(count * size, dtype=jnp.int32)[None] < lengths[:, None]
    chunks = -(-lengths // size)[:, None]
    index = jnp.arange(count, dtype=jnp.int32)[None]
    before = jnp.where(index == 0, chunks - 1, index - 1)

    def sort(x):
        return jnp.take_along_axis(x, order[..., None], axis=1).reshape(n, count, size, x.shape[2])

    def around(x):
        """Each chunk behind the one before it. A single one is its own, and all keys count twice alike."""
        there = before.reshape(n, count, *[1] * (x.ndim - 2))
        both = jnp.concatenate([jnp.take_along_axis(x, there, axis=1), x], axis=2)
        return both.reshape(n * count, 2 * size, *x.shape[3:])

    queries, keys, values = sort(q), around(sort(k)), around(sort(v))
    places, here = order.reshape(n, count, size), real.reshape(n, count, size)
    same = places.reshape(n * count, size)[..., None] == around(places)[:, None]
    piece = attention_with_lse(
        *(x[:, :, None] for x in (queries.reshape(n * count, size, q.shape[2]), keys, values)),
        logits=Logits(bias=jnp.where(same, ITSELF, 0.0)[:, None]),
        segment_ids=jnp.ones((n * count, size), jnp.int32),
        tokens=Tokens(kv_segment_ids=around(here).astype(jnp.int32)),
    )
    back = jnp.argsort(jnp.where(real, order, t + jnp.arange(count * size, dtype=jnp.int32)[None]), axis=1)[
        :, :t
    ]

    def restore(x):
        x = x.reshape(n, count * size, *x.shape[3:])
        return jnp.take_along_axis(x, back.reshape(n, t, *[1] * (x.ndim - 2)), axis=1)

    return Piece(*(restore(x[:, :, 0][:, :, None]) for x in piece))
