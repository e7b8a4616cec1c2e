"""DeltaNet: a matrix memory that a key overwrites by the delta rule (Yang et al. 2024, arXiv:2406.06484)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from layers.parameters import linear
from layers.parts.carry import check_inputs
from layers.parts.delta_memory import DeltaMemory, DeltaState
from layers.parts.heads import HeadNorm, head_size
from layers.segments import SegmentIds
from layers.typing import Array, Float


@dataclasses.dataclass(frozen=True)
class DeltaNetConfig:
    """Options of `DeltaNet`.

    Attributes:
      width: d, features in and out.
      heads: h.
      key_dim: K, features of a query and key head; width / heads if None.
      value_dim: V, features of a value head; width / heads if None.
      taps: of the short convolution, between 2 and 8.
      gate: gate the output with silu(W_g x).
      negative_eigenvalues: writing strengths in (0, 2) instead of (0, 1), so that a step may turn a sign
        (Grazzi et al. 2024, arXiv:2411.12537).
      epsilon: of the norm of every head.
      dtype: type of activations; the state is float32.
    """

    width: int
    heads: int = 4
    key_dim: int | None = None
    value_dim: int | None = None
    taps: int = 4
    gate: bool = False
    negative_eigenvalues: bool = False
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        _ = self.sizes

    @property
    def sizes(self) -> tuple[int, int]:
        """K and V."""
        return head_size("key_dim", self.key_dim, self), head_size("value_dim", self.value_dim, self)


class DeltaNet(nnx.Module):
    """DeltaNet: a matrix memory that a key overwrites by the delta rule (Yang et al. 2024, arXiv:2406.06484).

    q, k, v = silu(conv(W_q x)), silu(conv(W_k x)), silu(conv(W_v x)),   then q and k of norm 1
    beta = sigmoid(W_b x)                                                       (h)
    S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T,  o_t = S_t^T q_t / sqrt(K)  in every head
    y = W_o RMSNorm(o)                                                          norm by head
    """

    causal = True

    def __init__(self, config: DeltaNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        key_dim, value_dim = config.sizes
        values = config.heads * value_dim
        options = {"bias": False, "dtype": config.dtype, "rngs": rngs}
        self.memory = DeltaMemory(
            config.width,
            key_heads=config.heads,
            value_heads=config.heads,
            key_dim=key_dim,
            value_dim=value_dim,
            taps=config.taps,
            negative_eigenvalues=config.negative_eigenvalues,
            dtype=config.dtype,
            rngs=rngs,
        )
        self.gate = linear(config.width, values, **options) if config.gate else None
        self.norm = HeadNorm(
            value_dim,
            gate="silu" if config.gate else None,
            epsilon=config.epsilon,
            dtype=config.dtype,
            rngs=rngs,
        )
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
        check_inputs("DeltaNet", x, self.config.width, segment_ids)
        o, state = self.memory(x, state, segment_ids=segment_ids)
        return self.output(self.norm(o, self.gate(x) if self.gate is not None else None)), state
