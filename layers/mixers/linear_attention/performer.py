"""Performer: softmax attention estimated by positive orthogonal random features (Choromanski et al. 2020, arXiv:2009.14794)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.parameters import Constant, linear
from layers.parts.carry import check_inputs
from layers.parts.feature_attention import feature_attention
from layers.parts.heads import MemoryState, head_size, join_heads, split_heads
from layers.segments import SegmentIds
from layers.typing import Array, Float

# Bounds the exponents of keys, so that sums over a long sequence stay finite in float32.
LARGEST_EXPONENT = 60.0


@dataclasses.dataclass(frozen=True)
class PerformerConfig:
    """Options of `Performer`.

    Attributes:
      width: d, features in and out.
      heads: h.
      head_dim: K, features of a query, key and value head; width / heads if None.
      features: m, random features of a head; the error falls as 1 / sqrt(m).
      epsilon: added to every feature, so that no weight vanishes.
      causal: a token sees only itself and what came before.
      bias: add biases in the projections.
      dtype: type of activations; sums and state are float32.
    """

    width: int
    heads: int = 8
    head_dim: int | None = None
    features: int = 256
    epsilon: float = 1e-6
    causal: bool = True
    bias: bool = True
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        _ = self.size
        if self.features < 1:
            raise ValueError(f"features={self.features}; expected at least 1")
        if self.epsilon < 0:
            raise ValueError(f"epsilon={self.epsilon}; expected at least 0")

    @property
    def size(self) -> int:
        """Features of a head."""
        return head_size("head_dim", self.head_dim, self)


class Performer(nnx.Module):
    """Performer: attention by FAVOR+, positive orthogonal random features (Choromanski et al. 2020, arXiv:2009.14794).

        q, k, v = W_q x / K^(1/4), W_k x / K^(1/4), W_v x
        phi(q)_i = exp(w_i . q - max_j w_j . q) + epsilon,   phi(k)_i = exp(w_i . k - |k|^2 / 2) + epsilon
        y = W_o sum_s (phi(q_t) . phi(k_s)) v_s / sum_s (phi(q_t) . phi(k_s))       s <= t if causal

    The mean of the weights over w ~ N(0, 1)^K is proportional to exp(q . k) but for epsilon. The rows w (m, K) are
    orthogonal in blocks of K with lengths drawn as those of Gaussian vectors. They are drawn once, shared by the heads,
    and saved with the parameters.

    The authors subtract from the exponents of keys their maximum over all positions, which would let later tokens
    act on earlier ones through epsilon. It is left out: an exponent is at most |w_i|^2 / 2, and 60 here. Factors common
    to all features of a query cancel.
    """

    def __init__(self, config: PerformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.causal = config.causal
        width = config.heads * config.size
        options = {"bias": config.bias, "dtype": config.dtype, "rngs": rngs}
        self.query = linear(config.width, width, **options)
        self.key = linear(config.width, width, **options)
        self.value = linear(config.width, width, **options)
        self.output = linear(width, config.width, **options)
        self.directions = Constant(orthogonal_directions(rngs.params(), config.features, config.size))

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> MemoryState:
        """The zero state; its size does not depend on the length."""
        config = self.config
        if not self.causal:
            raise ValueError("a Performer with causal=False has no state; it needs the whole sequence")
        memory = jnp.zeros((batch_size, config.heads, config.features, config.size + 1), jnp.float32)
        return MemoryState(memory, jnp.zeros(batch_size, jnp.int32))

    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: MemoryState | None = None,
        *,
        segment_ids: SegmentIds = None,
    ) -> tuple[Float[Array, "b t d"], MemoryState | None]:
        """Mixes along time; see the contract of mixers in CONTRIBUTING.md."""
        config = self.config
        check_inputs("Performer", x, config.width, segment_ids)
        q, _ = self._projected(self.query(x))
        k, half_square = self._projected(self.key(x))
        q = jnp.exp(q - jax.lax.stop_gradient(q.max(-1, keepdims=True))) + config.epsilon
        k = jnp.exp(jnp.minimum(k - half_square, LARGEST_EXPONENT)) + config.epsilon
        o, state = feature_attention(
            q.astype(config.dtype),
            k.astype(config.dtype),
            split_heads(self.value(x), config.heads),
            state,
            causal=config.causal,
            segment_ids=segment_ids,
        )
        return self.output(join_heads(o)), state

    def _projected(self, x):
        """w . x (b, t, h, m) and |x|^2 / 2 (b, t, h, 1) of queries or keys by heads, scaled by K^(-1/4)."""
        x = split_heads(x.astype(jnp.float32), self.config.heads) * self.config.size**-0.25
        return jnp.einsum("bthk,mk->bthm", x, self.directions[...]), jnp.square(x).sum(-1, keepdims=True) / 2


def orthogonal_directions(key: jax.Array, count: int, size: int) -> Float[Array, "m k"]:
    """Gaussian vectors of which each `size` are orthogonal to each other: every one is distributed as N(0, 1)^size."""
    blocks = -(-count // size)
    turn, length = jax.random.split(key)
    q, r = jnp.linalg.qr(jax.random.normal(turn, (blocks, size, size)))
    # The signs make q uniform over all rotations and reflections, which QR alone does not.
    q = q * jnp.sign(jnp.diagonal(r, axis1=1, axis2=2))[:, None]
    lengths = jnp.linalg.norm(jax.random.normal(length, (count, size)), axis=1)
    return lengths[:, None] * q.reshape(blocks * size, size)[:count]
