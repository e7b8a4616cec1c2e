"""Linear attention: softmax's kernel replaced by a product of elu + 1 (Katharopoulos et al. 2020, arXiv:2006.16236)."""

import jax
import jax.numpy as jnp
from flax import nnx

from layers.mixer import SELF, Mixer
from layers.options import ActivationDtype, checked_dataclass
from layers.parameters import linear
from layers.parts.feature_attention import feature_attention
from layers.parts.heads import head_size, join_heads, split_heads
from layers.segments import Segments
from layers.typing import Array, Float


@checked_dataclass
class LinearAttentionConfig:
    """Options of `LinearAttention`.

    Attributes:
      width: d, number of input and output features.
      heads: h, number of heads.
      head_dim: K, features per query, key and value head; width / heads if None.
      causal: whether a token sees only itself and earlier tokens.
      bias: whether the projections have biases.
      dtype: dtype of the activations; sums and state are float32.
    """

    width: int
    heads: int = 8
    head_dim: int | None = None
    causal: bool = True
    bias: bool = True
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        _ = self.size

    @property
    def size(self) -> int:
        """Features per head."""
        return head_size("head_dim", self.head_dim, self)

    @property
    def mapped(self) -> int:
        """Features per head that a query or key is mapped to."""
        return self.size


class LinearAttention(Mixer):
    """Linear attention: features elu + 1 and a normalizer in place of softmax (Katharopoulos et al. 2020, arXiv:2006.16236).

        q, k = elu(W_q x) + 1, elu(W_k x) + 1,   v = W_v x
        S_t = S_{t-1} + k_t v_t^T,   z_t = z_{t-1} + k_t                            per head
        y = W_o (S_t^T q_t / (z_t^T q_t))

    Without `causal`, every token uses S and z of the end of its segment.
    """

    patterns = SELF

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
        """Returns the positive features of queries, float32."""
        return jax.nn.elu(q) + 1

    def map_key(self, k: Float[Array, "b t h k"]) -> Float[Array, "b t h m"]:
        """Returns the positive features of keys, float32."""
        return jax.nn.elu(k) + 1
