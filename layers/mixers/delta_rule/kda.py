"""KDA: Kimi Delta Attention, the delta rule with a decay on every key channel (Kimi Team 2025, arXiv:2510.26692)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from layers.parameters import linear
from layers.parts.carry import check_inputs
from layers.parts.decay import SoftplusDecay
from layers.parts.delta_memory import DeltaMemory, DeltaState
from layers.parts.heads import HeadNorm, head_size, multiplied_heads, split_heads
from layers.parts.low_rank import LowRank
from layers.segments import SegmentIds
from layers.typing import Array, Float


@dataclasses.dataclass(frozen=True)
class KDAConfig:
    """Options of `KDA`.

    Attributes:
      width: d, features in and out.
      heads: g, query and key heads.
      value_heads: h, a multiple of g; value head i reads query and key head i // (h / g). g if None.
      head_dim: K, features of a query, key and value head and the rank of decay and gate; width / heads if None.
      taps: of the short convolution, between 2 and 8.
      negative_eigenvalues: writing strengths in (0, 2) instead of (0, 1), so that a step may turn a sign
        (Grazzi et al. 2024, arXiv:2411.12537).
      epsilon: of the norm of every head.
      dtype: type of activations; decays and state are float32.
    """

    width: int
    heads: int = 4
    value_heads: int | None = None
    head_dim: int | None = None
    taps: int = 4
    negative_eigenvalues: bool = False
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        _ = self.size, self.outputs

    @property
    def outputs(self) -> int:
        """Value heads."""
        return multiplied_heads(self)

    @property
    def size(self) -> int:
        """Features of a head."""
        return head_size("head_dim", self.head_dim, self)


class KDA(nnx.Module):
    """KDA: Kimi Delta Attention, the delta rule with a decay by channel (Kimi Team 2025, arXiv:2510.26692).

        q, k, v = silu(conv(W_q x)), silu(conv(W_k x)), silu(conv(W_v x)),   then q and k of norm 1
        beta = sigmoid(W_b x)                                                       (h)
        log alpha = -exp(a) softplus(F_2 F_1 x + c)                                 (h, K); a: (h), F_1: (K, d)
        S' = Diag(alpha_t) S_{t-1},   S_t = S' + beta_t k_t (v_t - S'^T k_t)^T,  o_t = S_t^T q_t / sqrt(K)
        y = W_o (RMSNorm(o) * sigmoid(G_2 G_1 x + e))                               norm by head

    exp(a) starts uniform in [1, 16] and softplus(c) log-uniform in [0.001, 0.1].
    """

    causal = True

    def __init__(self, config: KDAConfig, *, rngs: nnx.Rngs):
        self.config = config
        size = config.size
        features = config.outputs * size
        options = {"bias": False, "dtype": config.dtype, "rngs": rngs}
        self.memory = DeltaMemory(
            config.width,
            key_heads=config.heads,
            value_heads=config.outputs,
            key_dim=size,
            value_dim=size,
            taps=config.taps,
            negative_eigenvalues=config.negative_eigenvalues,
            dtype=config.dtype,
            rngs=rngs,
        )
        self.rate = LowRank(config.width, size, features, **options)
        self.decay = SoftplusDecay(config.outputs, size, rates=(1.0, 16.0), rngs=rngs)
        self.gate = LowRank(config.width, size, features, dtype=config.dtype, rngs=rngs)
        self.norm = HeadNorm(size, gate="sigmoid", epsilon=config.epsilon, dtype=config.dtype, rngs=rngs)
        self.output = linear(features, config.width, **options)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> DeltaState:
        """The zero state; its size does not depend on the length."""
        return self.memory.init_state(batch_size)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: DeltaState | None = None,
        *,
        segment_ids: SegmentIds = None,
    ) -> tuple[Float[Array, "b t d"], DeltaState | None]:
        """Mixes along time; see the contract of mixers in CONTRIBUTING.md."""
        check_inputs("KDA", x, self.config.width, segment_ids)
        log_decay = self.decay(split_heads(self.rate(x), self.config.outputs))
        o, state = self.memory(x, state, log_decay=log_decay, segment_ids=segment_ids)
        return self.output(self.norm(o, self.gate(x))), state
