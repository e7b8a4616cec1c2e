"""Lightning Attention: linear attention whose heads and layers decay at fixed rates (MiniMax 2025, arXiv:2501.08313)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.kernels.gated_linear_attention import gated_linear_attention
from layers.mixer import Mixer
from layers.norms import NormConfig, RMSNorm
from layers.options import ActivationDtype, Count, NonNegative, checked_dataclass
from layers.parameters import Constant, linear
from layers.parts.heads import head_size, join_heads, split_heads
from layers.segments import Segments
from layers.typing import Array, Float


@checked_dataclass
class LightningAttentionConfig:
    """Options of `LightningAttention`.

    Attributes:
      width: d, number of input and output features.
      heads: h, number of heads.
      head_dim: K, features per query, key and value head; width / heads if None.
      epsilon: epsilon of the norm.
      layer, depth: index of the layer, from 0, and number of layers of the model; they set the decay rates.
      dtype: dtype of the activations; rates and state are float32.
    """

    width: int
    heads: int = 8
    head_dim: int | None = None
    epsilon: NonNegative = 1e-6
    layer: Count = 0
    depth: int = 1
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        _ = self.size
        if not 0 <= self.layer < self.depth:
            raise ValueError(f"layer={self.layer}, depth={self.depth}; expected 0 <= layer < depth")

    @property
    def size(self) -> int:
        """Features per head."""
        return head_size("head_dim", self.head_dim, self)


class LightningAttention(Mixer):
    """Lightning Attention: linear attention with fixed decay rates, as in MiniMax-01 (MiniMax 2025, arXiv:2501.08313).

        q, k, v = silu(W_q x), silu(W_k x), silu(W_v x)
        S_t = exp(-s) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t                        per head
        s = 2^(-8 (i + 1) / h) (1 - l / (L - 1) + 1e-5)                             head i, layer l of L
        y = W_o (sigmoid(W_g x) * RMSNorm(o))                                       norm over all heads together

    The rates are those of ALiBi, slower in later layers; the last layer hardly decays. The recurrence is that
    of Lightning Attention-2 (Qin et al. 2024, arXiv:2401.04658). The residual stream of MiniMax's model carries
    normalized values, which is a property of the block.
    """

    def __init__(self, config: LightningAttentionConfig, *, rngs: nnx.Rngs):
        self.config = config
        features = config.heads * config.size
        options = {"axes": ("embed", "heads"), "bias": False, "dtype": config.dtype, "rngs": rngs}
        self.query = linear(config.width, features, **options)
        self.key = linear(config.width, features, **options)
        self.value = linear(config.width, features, **options)
        self.gate = linear(config.width, features, **options)
        self.norm = RMSNorm(NormConfig(features, config.epsilon), rngs=rngs)
        self.output = linear(features, config.width, **options | {"axes": ("heads", "embed")})
        alibi = 2.0 ** (-8.0 * np.arange(1, config.heads + 1) / config.heads)
        # The first 1e-5 keeps a model of one layer defined; both are those of the released code.
        by_layer = 1 - config.layer / (config.depth - 1 + 1e-5) + 1e-5
        self.rates = Constant(jnp.asarray(alibi * by_layer, jnp.float32))

    def initial(self, batch_size: int, max_length: int | None) -> Float[Array, "b h k k"]:
        size = self.config.size
        return jnp.zeros((batch_size, self.config.heads, size, size), jnp.float32)

    def mix(
        self, x: Float[Array, "b t d"], carried: Float[Array, "b h k k"] | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b h k k"]]:
        config = self.config
        q, k, v = (split_heads(jax.nn.silu(f(x)), config.heads) for f in (self.query, self.key, self.value))
        o, memory = gated_linear_attention(
            q, k, v, log_decay=-self.rates[...], scale=1.0, initial_state=carried, segment_ids=segments
        )
        # Without a normalizer the sums grow with the length, so the norm precedes the rounding to `dtype`.
        y = self.norm(join_heads(o)) * jax.nn.sigmoid(self.gate(x).astype(jnp.float32))
        return self.output(y.astype(config.dtype)), memory
