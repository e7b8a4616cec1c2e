"""Linear attention: softmax's kernel replaced by a product of elu + 1 (Katharopoulos et al. 2020, arXiv:2006.16236)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.mixer import Mixer
from layers.parameters import linear
from layers.parts.feature_attention import feature_attention
from layers.parts.heads import head_size, join_heads, split_heads
from layers.segments import Segments
from layers.typing import Array, Float


@dataclasses.dataclass(frozen=True)
class LinearAttentionConfig:
    """Options of `LinearAttention`.

    Attributes:
      width: d, features in and out.
      heads: h.
      head_dim: K, features of a query, key and value head; width / heads if None.
      causal: a token sees only itself and what came before.
      bias: add biases in the projections.
      dtype: type of activations; sums and state are float32.
    """

    width: int
    heads: int = 8
    head_dim: int | None = None
    causal: bool = True
    bias: bool = True
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        _ = self.size

    @property
    def size(self) -> int:
        """Features of a head."""
        return head_size("head_dim", self.head_dim, self)

    @property
    def mapped(self) -> int:
        """Features that a query or key of a head is mapped to."""
        return self.size


class LinearAttention(Mixer):
    """Linear attention: features elu + 1 and a normaliser in place of softmax (Katharopoulos et al. 2020, arXiv:2006.16236).

        q, k = elu(W_q x) + 1, elu(W_k x) + 1,   v = W_v x
        S_t = S_{t-1} + k_t v_t^T,   z_t = z_{t-1} + k_t                            in every head
        y = W_o (S_t^T q_t / (z_t^T q_t))

    Without `causal` S and z are those of the end of the segment, for every token.
    """

    def __init__(self, config: LinearAttentionConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.causal = config.causal
        features = config.heads * config.size
        options = {"axes": ("embed", "heads"), "bias": config.bias, "dtype": config.dtype, "rngs": rngs}
        self.query = linear(config.width, features, **options)
        self.key = linear(config.width, features, **options)
        self.value = linear(config.width, features, **options)
        self.output = linear(features, config.width, **options | {"axes": ("heads", "embed")})

    def initial(self, batch_size: int, max_length: int | None) -> Float[Array, "b h k w"]:
        config = self.config
        return jnp.zeros((batch_size, config.heads, config.mapped, config.size + 1), jnp.float32)

    def mix(
        self, x: Float[Array, "b t d"], carried: Float[Array, "b h k w"] | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b h k w"] | None]:
        config = self.config
        q, k, v = (split_heads(f(x), config.heads) for f in (self.query, self.key, self.value))
        q, k = (
            f(u.astype(jnp.float32)).astype(config.dtype) for f, u in ((self.map_query, q), (self.map_key, k))
        )
        o, memory = feature_attention(q, k, v, carried, causal=config.causal, segment_ids=segments)
        return self.output(join_heads(o)), memory

    def map_query(self, q: Float[Array, "b t h k"]) -> Float[Array, "b t h m"]:
        """The positive features of queries, float32."""
        return jax.nn.elu(q) + 1

    def map_key(self, k: Float[Array, "b t h k"]) -> Float[Array, "b t h m"]:
        """The positive features of keys, float32."""
        return jax.nn.elu(k) + 1
