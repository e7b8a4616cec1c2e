"""GLA: linear attention whose state forgets by a learnt gate on every key channel (Yang et al. 2023, arXiv:2312.06635)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.mixers.carry import check_inputs
from layers.mixers.heads import HeadNorm, MemoryState, head_size, remember, split_heads
from layers.mixers.low_rank import LowRank
from layers.parameters import linear
from layers.typing import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class GLAConfig:
    """Options of `GLA`.

    Attributes:
      width: d, features in and out.
      heads: h.
      key_dim: K, features of a query and key head; width / (2 heads) if None.
      value_dim: V, features of a value head; width / heads if None.
      gate_rank: rank of the map that makes the decays.
      temperature: tau; the decays are the tau-th root of a sigmoid, so that they start near 1.
      epsilon: of the norm of every head.
      dtype: type of activations; decays and state are float32.
    """

    width: int
    heads: int = 4
    key_dim: int | None = None
    value_dim: int | None = None
    gate_rank: int = 16
    temperature: float = 16.0
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        head_size("key_dim", self.key_dim, self, 0.5)
        head_size("value_dim", self.value_dim, self)
        if self.gate_rank < 1:
            raise ValueError(f"gate_rank={self.gate_rank}; expected at least 1")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature}; expected a positive number")

    @property
    def sizes(self) -> tuple[int, int]:
        """K and V."""
        return head_size("key_dim", self.key_dim, self, 0.5), head_size("value_dim", self.value_dim, self)


class GLA(nnx.Module):
    """GLA: gated linear attention (Yang et al. 2023, arXiv:2312.06635).

        q, k, v = W_q x, W_k x, W_v x
        alpha = sigmoid(W_2 W_1 x + b)^(1 / tau)                       (h, K), W_1: (gate_rank, d)
        S_t = Diag(alpha_t) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)   in every head
        y = W_o (RMSNorm(o) * silu(W_g x))                             norm by head

    Queries, keys and the decay's map start Xavier-uniform with gain 2^-2.5 as in the authors' first code; the norm and
    the gate without bias are those of their later layer.
    """

    causal = True

    def __init__(self, config: GLAConfig, *, rngs: nnx.Rngs):
        self.config = config
        key_dim, value_dim = config.sizes
        keys, values = config.heads * key_dim, config.heads * value_dim
        options = {"bias": False, "dtype": config.dtype, "rngs": rngs}
        # Xavier-uniform of gain g has variance 2 g^2 / (inputs + outputs).
        small = nnx.initializers.variance_scaling(2**-5, "fan_avg", "uniform")
        self.query = linear(config.width, keys, init=small, **options)
        self.key = linear(config.width, keys, init=small, **options)
        self.value = linear(config.width, values, **options)
        self.gate = linear(config.width, values, **options)
        self.decay = LowRank(
            config.width, config.gate_rank, keys, init=(small, small), dtype=config.dtype, rngs=rngs
        )
        self.norm = HeadNorm(value_dim, gate="silu", epsilon=config.epsilon, dtype=config.dtype, rngs=rngs)
        self.output = linear(values, config.width, **options)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> MemoryState:
        """The zero state; its size does not depend on the length."""
        memory = jnp.zeros((batch_size, self.config.heads, *self.config.sizes), jnp.float32)
        return MemoryState(memory, jnp.zeros(batch_size, jnp.int32))

    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: MemoryState | None = None,
        *,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], MemoryState | None]:
        """Mixes along time; see the contract of mixers in CONTRIBUTING.md."""
        config = self.config
        check_inputs("GLA", x, config.width, segment_ids)
        log_decay = jax.nn.log_sigmoid(self.decay(x)) / config.temperature
        o, state = remember(
            split_heads(self.query(x), config.heads),
            split_heads(self.key(x), config.heads),
            split_heads(self.value(x), config.heads),
            state,
            log_decay=split_heads(log_decay, config.heads),
            segment_ids=segment_ids,
        )
        return self.output(self.norm(o, self.gate(x))), state
