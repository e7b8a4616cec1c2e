"""Nystromformer: attention through landmarks and a pseudo-inverse (Xiong et al. 2021, arXiv:2102.03902)."""

import jax
import jax.numpy as jnp
from flax import nnx

from layers.kernels.attention import Tokens, attention
from layers.kernels.long_conv import long_conv
from layers.options import Count, checked_dataclass
from layers.parameters import parameter, uniform_fan_in
from layers.parts.heads import join_heads, split_heads
from layers.parts.whole_attention import WholeAttention, WholeAttentionConfig


@checked_dataclass
class NystromformerConfig(WholeAttentionConfig):
    """Options of `Nystromformer`, and those of `WholeAttentionConfig`.

    Attributes:
      landmarks: m, number of means of consecutive tokens.
      iterations: steps of the iteration for the pseudo-inverse.
      taps: width of the convolution of values over time, odd; 0 for none.
    """

    landmarks: int = 64
    iterations: int = 6
    taps: Count = 33

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.taps and self.taps % 2 == 0:
            raise ValueError(f"taps={self.taps}; expected an odd number, or 0")


class Nystromformer(WholeAttention):
    """Nystromformer: softmax attention by the Nystrom method (Xiong et al. 2021, arXiv:2102.03902).

        F = softmax(q k~^T / sqrt(head_dim)),  A = softmax(q~ k~^T / sqrt(head_dim)),  B = softmax(q~ k^T / sqrt(head_dim))
        y = W_o (F A^+ B v + w * v),   q~, k~ means of q and k over m pieces of the sequence, as equal as can be
        Z_0 = A^T / max_j sum_i A_ij,   Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4,   A^+ the last Z

    with w a filter per head, centred. Z_0 is that of each matrix by itself, so that a sequence does not depend on others of
    its batch. Sequences of at most m tokens get exact softmax attention. Linear in t; packed rows cost one pass per segment;
    not causal.
    """

    def __init__(self, config: NystromformerConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        shape = (config.taps, config.heads)
        init = uniform_fan_in()
        self.filter = parameter(rngs, init, shape, axes=(None, "heads")) if config.taps else None

    def weights(self):
        return None if self.filter is None else self.filter[...]

    @staticmethod
    def attend(config, weights, heads, lengths):
        q, k, v = heads
        (t, count), tokens = (q.shape[1], config.landmarks), Tokens(kv_lengths=lengths)
        exact = attention(q[:, :count], k[:, :count], v[:, :count], tokens=tokens)
        y = jnp.pad(exact, ((0, 0), (0, max(0, t - count)), (0, 0), (0, 0)))
        if t > count:
            index = jnp.arange(t, dtype=jnp.int32)[None]
            piece = jnp.where(index < lengths[:, None], index * count // lengths[:, None], count)
            own = (piece[:, None] == jnp.arange(count, dtype=jnp.int32)[None, :, None]).astype(jnp.float32)
            own = own / jnp.maximum(own.sum(2, keepdims=True), 1)
            mean_q, mean_k = (jnp.einsum("bmt,bthk->bmhk", own, x.astype(jnp.float32)) for x in (q, k))
            logits = jnp.einsum("bmhk,bnhk->bhmn", mean_q, mean_k, precision=jax.lax.Precision.HIGHEST)
            inverse = pseudo_inverse(jax.nn.softmax(logits / q.shape[3] ** 0.5, axis=-1), config.iterations)
            values = attention(mean_q.astype(q.dtype), k, v, tokens=tokens)
            values = jnp.einsum(
                "bhmn,bnhk->bmhk", inverse, values.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
            )
            whole = attention(q, mean_k.astype(q.dtype), values.astype(v.dtype))
            y = jnp.where((lengths > count)[:, None, None, None], whole, y)
        return y if weights is None else y + _filtered(v, weights)


def pseudo_inverse(matrix: jax.Array, iterations: int) -> jax.Array:
    """Returns the limit of the paper's iteration for (..., m, m) matrices whose rows sum to 1, nearly."""
    one = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)[(None,) * (matrix.ndim - 2)]
    z = jnp.swapaxes(matrix, -1, -2) / matrix.sum(-2).max(-1)[..., None, None]

    def product(a, b):
        return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)

    for _ in range(iterations):
        az = product(matrix, z)
        z = 0.25 * product(z, 13 * one - product(az, 15 * one - product(az, 7 * one - az)))
    return z


def _filtered(v, weights):
    """Values convolved over time by the filters (taps, h), the middle tap at the token itself."""
    t, half = v.shape[1], weights.shape[0] // 2
    x = jnp.pad(join_heads(v), ((0, 0), (0, half), (0, 0)))
    taps = jnp.swapaxes(jnp.repeat(weights[::-1], v.shape[3], axis=1), 0, 1)
    return split_heads(long_conv(x, taps)[0][:, half : half + t], v.shape[2])
