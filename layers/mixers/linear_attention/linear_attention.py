"""Linear attention: softmax's kernel replaced by a product of elu + 1 (Katharopoulos et al. 2020, arXiv:2006.16236)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.parameters import linear
from layers.parts.carry import check_inputs
from layers.parts.feature_attention import feature_attention
from layers.parts.heads import MemoryState, head_size, join_heads, split_heads
from layers.segments import SegmentIds
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


class LinearAttention(nnx.Module):
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
        options = {"bias": config.bias, "dtype": config.dtype, "rngs": rngs}
        self.query = linear(config.width, features, **options)
        self.key = linear(config.width, features, **options)
        self.value = linear(config.width, features, **options)
        self.output = linear(features, config.width, **options)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> MemoryState:
        """The zero state; its size does not depend on the length."""
        if not self.causal:
            raise ValueError("linear attention with causal=False has no state; it needs the whole sequence")
        size = self.config.size
        memory = jnp.zeros((batch_size, self.config.heads, size, size + 1), jnp.float32)
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
        check_inputs("linear attention", x, config.width, segment_ids)
        q, k = (jax.nn.elu(f(x).astype(jnp.float32)) + 1 for f in (self.query, self.key))
        o, state = feature_attention(
            split_heads(q.astype(config.dtype), config.heads),
            split_heads(k.astype(config.dtype), config.heads),
            split_heads(self.value(x), config.heads),
            state,
            causal=config.causal,
            segment_ids=segment_ids,
        )
        return self.output(join_heads(o)), state
