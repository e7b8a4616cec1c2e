"""DeltaNet: a matrix memory that a key overwrites by the delta rule (Yang et al. 2024, arXiv:2406.06484)."""

from flax import nnx

from layers.mixer import Mixer
from layers.options import checked_dataclass
from layers.parameters import linear
from layers.parts.delta_memory import DeltaCarry, DeltaMemory, DeltaRuleConfig
from layers.parts.heads import HeadNorm, head_size
from layers.segments import Segments
from layers.typing import Array, Float


@checked_dataclass
class DeltaNetConfig(DeltaRuleConfig):
    """Options of `DeltaNet`: those of `DeltaRuleConfig` and more.

    Attributes:
      key_dim: K, features per query and key head; width / heads if None.
      value_dim: V, features per value head; width / heads if None.
      gate: whether silu(W_g x) gates the output.
    """

    key_dim: int | None = None
    value_dim: int | None = None
    gate: bool = False

    @property
    def sizes(self) -> tuple[int, int]:
        """K and V."""
        return head_size("key_dim", self.key_dim, self), head_size("value_dim", self.value_dim, self)


class DeltaNet(Mixer):
    """DeltaNet: a matrix memory that a key overwrites by the delta rule (Yang et al. 2024, arXiv:2406.06484).

    q, k, v = silu(conv(W_q x)), silu(conv(W_k x)), silu(conv(W_v x)),   then q and k of norm 1
    beta = sigmoid(W_b x)                                                       (h)
    S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T,  o_t = S_t^T q_t / sqrt(K)  per head
    y = W_o RMSNorm(o)                                                          norm per head
    """

    def __init__(self, config: DeltaNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        _, value_dim = config.sizes
        values = config.outputs * value_dim
        options = {"bias": False, "dtype": config.dtype, "rngs": rngs}
        self.memory = DeltaMemory(config, rngs=rngs)
        self.gate = linear(config.width, values, axes=("embed", "heads"), **options) if config.gate else None
        gate = "silu" if config.gate else None
        self.norm = HeadNorm(value_dim, gate=gate, epsilon=config.epsilon, dtype=config.dtype, rngs=rngs)
        self.output = linear(values, config.width, axes=("heads", "embed"), **options)

    def initial(self, batch_size: int, max_length: int | None) -> DeltaCarry:
        return self.memory.initial(batch_size)

    def mix(
        self, x: Float[Array, "b t d"], carried: DeltaCarry | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], DeltaCarry]:
        o, carried = self.memory(x, carried, segment_ids=segments)
        return self.output(self.norm(o, None if self.gate is None else self.gate(x))), carried
