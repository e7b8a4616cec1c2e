"""ETC: global and long tokens, and learned labels of their relations (Ainslie et al. 2020, arXiv:2004.08483)."""

import jax.numpy as jnp
from flax import nnx

from layers.kernels.attention import Logits, Tokens, attention, attention_with_lse, compose
from layers.options import checked_dataclass
from layers.parameters import linear, parameter
from layers.parts.neighbours import distances, in_blocks, near_attention
from layers.parts.whole_attention import WholeAttention, WholeAttentionConfig


@checked_dataclass
class ETCConfig(WholeAttentionConfig):
    """Options of `ETC`, and those of `WholeAttentionConfig`.

    Attributes:
      global_tokens: n, number of first tokens of a sequence that are the global input.
      radius: largest distance at which long tokens see each other.
      clip: distance from which on relative positions share a label.
    """

    global_tokens: int = 16
    radius: int = 84
    clip: int = 12


class ETC(WholeAttention):
    """ETC: global-local attention with relative positions (Ainslie et al. 2020, arXiv:2004.08483).

        a_ij = (q_i . k_j + q_i . a_l(i,j) + c_l(i,j)) / sqrt(head_dim)
        y_i  = W softmax_j(a_ij) v_j,   all j for global i; j global or |i - j| <= radius for long i

    with an output projection W of its own for global tokens. Labels l are relative positions, clipped, between two global
    or two long tokens, and whether a long token belongs to a global one between these: each of the n global tokens owns an
    equal share of the long input. The paper leaves that structure to the task; equal shares are our reading for plain
    sequences. Each of the four kinds of pairs has its labels. Linear in t; packed rows cost one pass per segment; not causal.
    """

    def __init__(self, config: ETCConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        options = {"axes": ("heads", "embed"), "bias": config.bias, "dtype": config.dtype, "rngs": rngs}
        self.global_output = linear(config.width, config.width, **options)
        size, relative = config.width // config.heads, 2 * config.clip + 1
        normal, zeros = nnx.initializers.truncated_normal(0.5), nnx.initializers.zeros_init()
        axes = (None, "heads")
        for name, count in {
            "long_long": relative,
            "global_global": relative,
            "long_global": 2,
            "global_long": 2,
        }.items():
            keys = parameter(rngs, normal, (count, config.heads, size), axes=(*axes, None))
            numbers = parameter(rngs, zeros, (count, config.heads), group="no_decay", axes=axes)
            setattr(self, f"{name}_keys", keys)
            setattr(self, f"{name}_biases", numbers)

    def weights(self):
        names = ("long_long", "global_global", "long_global", "global_long")
        return [(getattr(self, f"{name}_keys")[...], getattr(self, f"{name}_biases")[...]) for name in names]

    def finish(self, y, positions):
        return jnp.where(
            (positions < self.config.global_tokens)[..., None], self.global_output(y), self.output(y)
        )

    @staticmethod
    def attend(config, weights, heads, lengths):
        q, k, v = heads
        (b, t), count = q.shape[:2], min(config.global_tokens, q.shape[1])
        long_long, global_global, long_global, global_long = weights
        clipped = jnp.clip(distances(config.radius), -config.clip, config.clip) + config.clip
        near = near_attention(
            *(q, k, v),
            radius=config.radius,
            bias=_bias(in_blocks(q, config.radius + 1), long_long, clipped[None]),
            lengths=lengths,
            first=count,
        )
        index = jnp.arange(count, dtype=jnp.int32)
        share = jnp.maximum(-(-(lengths - count) // count), 1)[:, None]
        belongs = ((jnp.arange(t, dtype=jnp.int32)[None] - count) // share)[..., None] == index[None, None]
        tokens = Tokens(kv_lengths=jnp.minimum(lengths, count))
        far = attention_with_lse(
            *(q, k[:, :count], v[:, :count]),
            logits=Logits(bias=_bias(q, long_global, belongs.astype(jnp.int32))),
            tokens=tokens,
        )
        y = compose(near, far).output
        relative = jnp.clip(index[None] - index[:, None], -config.clip, config.clip) + config.clip
        to_globals = jnp.broadcast_to(
            _bias(q[:, :count], global_global, relative[None]), (b, q.shape[2], count, count)
        )
        to_long = _bias(q[:, :count], global_long, jnp.swapaxes(belongs, 1, 2)[..., count:].astype(jnp.int32))
        rows = attention(
            *(q[:, :count], k, v),
            logits=Logits(bias=jnp.concatenate([to_globals, to_long], axis=3)),
            tokens=Tokens(kv_lengths=lengths),
        )
        return jnp.concatenate([rows, y[:, count:].astype(rows.dtype)], axis=1)


def _bias(q, table, labels):
    """(q . a_l + c_l) / sqrt(head_dim) for queries (b, q, h, k) and labels (b|1, q, s): (b, h, q, s)."""
    keys, numbers = table
    products = jnp.einsum("bqhk,lhk->bhql", q, keys.astype(q.dtype), preferred_element_type=jnp.float32)
    products = (products + jnp.swapaxes(numbers, 0, 1)[None, :, None]) / q.shape[3] ** 0.5
    return jnp.take_along_axis(products, labels[:, None], axis=3)
