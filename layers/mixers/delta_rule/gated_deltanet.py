"""Gated DeltaNet: the delta rule with a learnt decay for every head (Yang et al. 2024, arXiv:2412.06464)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from layers.parameters import linear
from layers.parts.carry import check_inputs
from layers.parts.decay import SoftplusDecay
from layers.parts.delta_memory import DeltaMemory, DeltaState
from layers.parts.heads import HeadNorm, head_size, multiplied_heads
from layers.segments import SegmentIds
from layers.typing import Array, Float


@dataclasses.dataclass(frozen=True)
class GatedDeltaNetConfig:
    """Options of `GatedDeltaNet`.

    Attributes:
      width: d, features in and out.
      heads: g, query and key heads.
      value_heads: h, a multiple of g; value head i reads query and key head i // (h / g). g if None.
      key_dim: K, features of a query and key head; 3/4 width / heads if None.
      value_dim: V, features of a value head; 2 K if None.
      taps: of the short convolution, between 2 and 8.
      negative_eigenvalues: writing strengths in (0, 2) instead of (0, 1), so that a step may turn a sign
        (Grazzi et al. 2024, arXiv:2411.12537).
      epsilon: of the norm of every head.
      dtype: type of activations; decays and state are float32.
    """

    width: int
    heads: int = 4
    value_heads: int | None = None
    key_dim: int | None = None
    value_dim: int | None = None
    taps: int = 4
    negative_eigenvalues: bool = False
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        _ = self.sizes, self.outputs

    @property
    def outputs(self) -> int:
        """Value heads."""
        return multiplied_heads(self)

    @property
    def sizes(self) -> tuple[int, int]:
        """K and V."""
        key_dim = head_size("key_dim", self.key_dim, self, 0.75)
        given = 2 * key_dim if self.value_dim is None else self.value_dim
        return key_dim, head_size("value_dim", given, self)


class GatedDeltaNet(nnx.Module):
    """Gated DeltaNet: the delta rule with a learnt decay for every head (Yang et al. 2024, arXiv:2412.06464).

        q, k, v = silu(conv(W_q x)), silu(conv(W_k x)), silu(conv(W_v x)),   then q and k of norm 1
        beta = sigmoid(W_b x),  log alpha = -exp(a) softplus(W_a x + c)             (h)
        S' = alpha_t S_{t-1},   S_t = S' + beta_t k_t (v_t - S'^T k_t)^T,  o_t = S_t^T q_t / sqrt(K)
        y = W_o (RMSNorm(o) * silu(W_g x))                                          norm by head

    exp(a) starts uniform in [0.01, 16] and softplus(c) log-uniform in [0.001, 0.1]. The authors draw exp(a) from 0 on;
    what is left out would not decay at all.
    """

    causal = True

    def __init__(self, config: GatedDeltaNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        key_dim, value_dim = config.sizes
        values = config.outputs * value_dim
        options = {"bias": False, "dtype": config.dtype, "rngs": rngs}
        self.memory = DeltaMemory(
            config.width,
            key_heads=config.heads,
            value_heads=config.outputs,
            key_dim=key_dim,
            value_dim=value_dim,
            taps=config.taps,
            negative_eigenvalues=config.negative_eigenvalues,
            dtype=config.dtype,
            rngs=rngs,
        )
        self.rate = linear(config.width, config.outputs, **options)
        self.decay = SoftplusDecay(config.outputs, rates=(0.01, 16.0), rngs=rngs)
        self.gate = linear(config.width, values, **options)
        self.norm = HeadNorm(value_dim, gate="silu", epsilon=config.epsilon, dtype=config.dtype, rngs=rngs)
        self.output = linear(values, config.width, **options)

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
        check_inputs("Gated DeltaNet", x, self.config.width, segment_ids)
        o, state = self.memory(x, state, log_decay=self.decay(self.rate(x)), segment_ids=segment_ids)
        return self.output(self.norm(o, self.gate(x))), state
