"""Based: linear attention with the second-order Taylor features of exp (Arora et al. 2024, arXiv:2402.18668)."""

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
class BasedConfig:
    """Options of `Based`.

    Attributes:
      width: d, number of input and output features.
      heads: h, number of heads.
      feature_dim: K, features per query and key head before the map, which makes 1 + K + K^2 of them.
      value_dim: V, features per value head; width / heads if None.
      causal: whether a token sees only itself and earlier tokens.
      dtype: dtype of the activations; sums and state are float32.
    """

    width: int
    heads: int = 16
    feature_dim: int = 16
    value_dim: int | None = None
    causal: bool = True
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        _ = self.size

    @property
    def size(self) -> int:
        """V."""
        return head_size("value_dim", self.value_dim, self)


class Based(Mixer):
    """Based: softmax attention up to the second order of its exponential, as a recurrence (Arora et al. 2024, arXiv:2402.18668).

        q, k, v = W_q x, W_k x, W_v x,   phi(u) = [1, u / K^(1/4), vec(u u^T) / sqrt(2 K)]
        phi(q) . phi(k) = 1 + z + z^2 / 2,   z = q . k / sqrt(K)
        S_t = S_{t-1} + phi(k_t) v_t^T,   n_t = n_{t-1} + phi(k_t),   y_t = W_o (S_t^T phi(q_t) / (n_t^T phi(q_t)))

    The weights are at least 1/2. The paper alternates these layers with attention over a small window, and with gated short
    convolutions; `configs/hybrids.py` has the former as `based`.
    """

    patterns = SELF

    def __init__(self, config: BasedConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.causal = config.causal
        keys, values = config.heads * config.feature_dim, config.heads * config.size
        options = {"axes": ("embed", "heads"), "bias": False, "dtype": config.dtype, "rngs": rngs}
        self.query = linear(config.width, keys, **options)
        self.key = linear(config.width, keys, **options)
        self.value = linear(config.width, values, **options)
        self.output = linear(values, config.width, **options | {"axes": ("heads", "embed")})

    def initial(self, batch_size: int, max_length: int | None) -> Float[Array, "b h k w"]:
        config = self.config
        features = 1 + config.feature_dim + config.feature_dim**2
        return jnp.zeros((batch_size, config.heads, features, config.size + 1), jnp.float32)

    def mix(
        self, x: Float[Array, "b t d"], carried: Float[Array, "b h k w"] | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b h k w"] | None]:
        config = self.config
        q, k, v = (split_heads(f(x), config.heads) for f in (self.query, self.key, self.value))
        q, k = (taylor_features(part).astype(config.dtype) for part in (q, k))
        o, memory = feature_attention(q, k, v, carried, causal=config.causal, segment_ids=segments)
        return self.output(join_heads(o)), memory


def taylor_features(u: Float[Array, "b t h k"]) -> Float[Array, "b t h m"]:
    """Returns phi(u), float32, with phi(a) . phi(b) = 1 + z + z^2 / 2 for z = a . b / sqrt(K)."""
    u = u.astype(jnp.float32) * u.shape[-1] ** -0.25
    squares = (u[..., :, None] * u[..., None, :]).reshape(*u.shape[:-1], u.shape[-1] ** 2)
    return jnp.concatenate([jnp.ones_like(u[..., :1]), u, squares * 0.5**0.5], axis=-1)
