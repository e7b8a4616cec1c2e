"""Gated DeltaNet: the delta rule with a learned decay per head (Yang et al. 2024, arXiv:2412.06464)."""

from flax import nnx

from layers.mixer import Mixer
from layers.options import checked_dataclass
from layers.parameters import linear
from layers.parts.delta_memory import DeltaCarry, DeltaMemory, WideValuesConfig
from layers.parts.heads import HeadNorm
from layers.parts.log_decay import SoftplusDecay
from layers.segments import Segments
from layers.typing import Array, Float


@checked_dataclass
class GatedDeltaNetConfig(WideValuesConfig):
    """Options of `GatedDeltaNet`: those of `WideValuesConfig`."""


class GatedDeltaNet(Mixer):
    """Gated DeltaNet: the delta rule with a learned decay per head (Yang et al. 2024, arXiv:2412.06464).

        q, k, v = silu(conv(W_q x)), silu(conv(W_k x)), silu(conv(W_v x)),   then q and k of norm 1
        beta = sigmoid(W_b x),  log alpha = -exp(a) softplus(W_a x + c)             (h)
        S' = alpha_t S_{t-1},   S_t = S' + beta_t k_t (v_t - S'^T k_t)^T,  o_t = S_t^T q_t / sqrt(K)
        y = W_o (RMSNorm(o) * silu(W_g x))                                          norm per head

    exp(a) starts uniform in [0.01, 16] and softplus(c) log-uniform in [0.001, 0.1]. The authors draw exp(a) from 0 on;
    the values left out here would hardly decay.
    """

    def __init__(self, config: GatedDeltaNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        _, value_dim = config.sizes
        values = config.outputs * value_dim
        options = {"axes": ("embed", "heads"), "bias": False, "dtype": config.dtype, "rngs": rngs}
        self.memory = DeltaMemory(config, rngs=rngs)
        self.rate = linear(config.width, config.outputs, **options)
        self.decay = SoftplusDecay(config.outputs, rates=(0.01, 16.0), rngs=rngs)
        self.gate = linear(config.width, values, **options)
        self.norm = HeadNorm(value_dim, gate="silu", epsilon=config.epsilon, dtype=config.dtype, rngs=rngs)
        self.output = linear(values, config.width, **options | {"axes": ("heads", "embed")})

    def initial(self, batch_size: int, max_length: int | None) -> DeltaCarry:
        return self.memory.initial(batch_size)

    def mix(
        self, x: Float[Array, "b t d"], carried: DeltaCarry | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], DeltaCarry]:
        o, carried = self.memory(x, carried, log_decay=self.decay(self.rate(x)), segment_ids=segments)
        return self.output(self.norm(o, self.gate(x))), carried
