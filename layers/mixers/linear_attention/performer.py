"""Performer: softmax attention by positive orthogonal random features (Choromanski et al. 2020, arXiv:2009.14794)."""

import jax
import jax.numpy as jnp
from flax import nnx

from layers.mixers.linear_attention.linear_attention import LinearAttention, LinearAttentionConfig
from layers.options import NonNegative, checked_dataclass
from layers.parameters import Constant
from layers.typing import Array, Float

# Bounds the exponents of keys, so that sums over a long sequence stay finite in float32.
LARGEST_EXPONENT = 60.0


@checked_dataclass
class PerformerConfig(LinearAttentionConfig):
    """Options of `Performer`: those of `LinearAttentionConfig` and more.

    Attributes:
      features: m, number of random features per head; the error falls as 1 / sqrt(m).
      epsilon: number added to every feature, so that no weight vanishes.
    """

    features: int = 256
    epsilon: NonNegative = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()

    @property
    def mapped(self) -> int:
        """Number of random features m."""
        return self.features


class Performer(LinearAttention):
    """Performer: attention by FAVOR+, positive orthogonal random features (Choromanski et al. 2020, arXiv:2009.14794).

        q, k, v = W_q x / K^(1/4), W_k x / K^(1/4), W_v x
        phi(q)_i = exp(w_i . q - max_j w_j . q) + epsilon,   phi(k)_i = exp(w_i . k - |k|^2 / 2) + epsilon
        y = W_o sum_s (phi(q_t) . phi(k_s)) v_s / sum_s (phi(q_t) . phi(k_s))       s <= t if causal

    The mean of the weights over w ~ N(0, 1)^K is proportional to exp(q . k), up to epsilon. The rows w (m, K) are
    orthogonal in blocks of K with lengths drawn as those of Gaussian vectors. They are drawn once, shared by all heads,
    and saved with the parameters.

    The authors subtract the maximum over all positions from the exponents of keys, which lets later tokens act on earlier
    ones through epsilon. Here it is left out: an exponent is at most |w_i|^2 / 2, and is clipped at 60. Factors common to
    all features of a query cancel.
    """

    def __init__(self, config: PerformerConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.directions = Constant(orthogonal_directions(rngs.params(), config.features, config.size))

    def map_query(self, q: Float[Array, "b t h k"]) -> Float[Array, "b t h m"]:
        """Returns phi(q), float32."""
        along, _ = self._projected(q)
        return jnp.exp(along - jax.lax.stop_gradient(along.max(-1, keepdims=True))) + self.config.epsilon

    def map_key(self, k: Float[Array, "b t h k"]) -> Float[Array, "b t h m"]:
        """Returns phi(k), float32."""
        along, half_square = self._projected(k)
        return jnp.exp(jnp.minimum(along - half_square, LARGEST_EXPONENT)) + self.config.epsilon

    def _projected(self, x):
        """Returns w . x (b, t, h, m) and |x|^2 / 2 (b, t, h, 1) of queries or keys, scaled by K^(-1/4)."""
        x = x * self.config.size**-0.25
        return jnp.einsum("bthk,mk->bthm", x, self.directions[...]), jnp.square(x).sum(-1, keepdims=True) / 2


def orthogonal_directions(key: jax.Array, count: int, size: int) -> Float[Array, "m k"]:
    """Returns vectors distributed as N(0, 1)^size, orthogonal to each other within each group of `size`."""
    blocks = -(-count // size)
    turn, length = jax.random.split(key)
    q, r = jnp.linalg.qr(jax.random.normal(turn, (blocks, size, size)))
    # The signs make q uniform over all rotations and reflections, which QR alone does not.
    q = q * jnp.sign(jnp.diagonal(r, axis1=1, axis2=2))[:, None]
    lengths = jnp.linalg.norm(jax.random.normal(length, (count, size)), axis=1)
    return lengths[:, None] * q.reshape(blocks * size, size)[:count]
