"""KDA: Kimi Delta Attention, the delta rule with a decay on every key channel (Kimi Team 2025, arXiv:2510.26692)."""

from flax import nnx

from layers.mixer import Mixer
from layers.options import checked_dataclass
from layers.parameters import linear
from layers.parts.delta_memory import DeltaCarry, DeltaMemory, SharedKeysConfig
from layers.parts.heads import HeadNorm, head_size, split_heads
from layers.parts.log_decay import BoundedDecay, SoftplusDecay
from layers.parts.low_rank import LowRank
from layers.segments import Segments
from layers.typing import Array, Float


@checked_dataclass
class KDAConfig(SharedKeysConfig):
    """Options of `KDA`: those of `SharedKeysConfig` and more.

    Attributes:
      head_dim: K, features of a query, key and value head and the rank of decay and gate; width / heads if None.
      lowest_decay: bound of log alpha per step, below 0, as in later models (-5 there); None for the softplus, which has none.
      full_gate: whether the output gate is one matrix W_g without bias, as in later models, in place of G_2 G_1 and e.
    """

    head_dim: int | None = None
    lowest_decay: float | None = None
    full_gate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lowest_decay is not None and self.lowest_decay >= 0:
            raise ValueError(
                f"lowest_decay={self.lowest_decay}; expected a number below 0, such as -5, or None"
            )

    @property
    def sizes(self) -> tuple[int, int]:
        """K and V, which are equal."""
        size = head_size("head_dim", self.head_dim, self)
        return size, size


class KDA(Mixer):
    """KDA: Kimi Delta Attention, the delta rule with a decay by channel (Kimi Team 2025, arXiv:2510.26692).

        q, k, v = silu(conv(W_q x)), silu(conv(W_k x)), silu(conv(W_v x)),   then q and k of norm 1
        beta = sigmoid(W_b x)                                                       (h)
        log alpha = -exp(a) softplus(F_2 F_1 x + c)                                 (h, K); a: (h), F_1: (K, d)
        S' = Diag(alpha_t) S_{t-1},   S_t = S' + beta_t k_t (v_t - S'^T k_t)^T,  o_t = S_t^T q_t / sqrt(K)
        y = W_o (RMSNorm(o) * sigmoid(G_2 G_1 x + e))                               norm per head

    exp(a) starts uniform in [1, 16] and softplus(c) log-uniform in [0.001, 0.1]. With `lowest_decay`, log alpha is
    lowest_decay sigmoid(exp(a) (F_2 F_1 x + c)), and exp(a) starts at 1.
    """

    def __init__(self, config: KDAConfig, *, rngs: nnx.Rngs):
        self.config = config
        size, _ = config.sizes
        features = config.outputs * size
        options = {"dtype": config.dtype, "rngs": rngs}
        self.memory = DeltaMemory(config, rngs=rngs)
        self.rate = LowRank(config.width, size, features, bias=False, **options)
        if config.lowest_decay is None:
            self.decay = SoftplusDecay(config.outputs, size, rates=(1.0, 16.0), rngs=rngs)
        else:
            self.decay = BoundedDecay(config.outputs, size, lowest=config.lowest_decay, rngs=rngs)
        if config.full_gate:
            self.gate = linear(config.width, features, axes=("embed", "heads"), bias=False, **options)
        else:
            self.gate = LowRank(config.width, size, features, **options)
        self.norm = HeadNorm(size, gate="sigmoid", epsilon=config.epsilon, **options)
        self.output = linear(features, config.width, axes=("heads", "embed"), bias=False, **options)

    def initial(self, batch_size: int, max_length: int | None) -> DeltaCarry:
        return self.memory.initial(batch_size)

    def mix(
        self, x: Float[Array, "b t d"], carried: DeltaCarry | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], DeltaCarry]:
        log_decay = self.decay(split_heads(self.rate(x), self.config.outputs))
        o, carried = self.memory(x, carried, log_decay=log_decay, segment_ids=segments)
        return self.output(self.norm(o, self.gate(x))), carried
