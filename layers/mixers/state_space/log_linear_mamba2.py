"""Log-linear Mamba-2: a state per bucket of a past that is divided logarithmically (Guo et al. 2025, arXiv:2506.04761)."""

import jax
import jax.numpy as jnp
from flax import nnx

from layers.mixers.state_space.mamba2 import Mamba2, Mamba2Carry, Mamba2Config
from layers.options import checked_dataclass
from layers.parameters import NO_DECAY, linear, parameter
from layers.parts.levels import LevelStates, level_attention


@checked_dataclass
class LogLinearMamba2Config(Mamba2Config):
    """Options of `LogLinearMamba2`: those of `Mamba2Config` and more.

    Attributes:
      levels: L, number of states per head; segments of up to 2^L tokens are seen whole, at most 30.
    """

    levels: int = 14

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.levels <= 30:
            raise ValueError(f"levels={self.levels}; expected 1 to 30")


class LogLinearMamba2(Mamba2):
    """Log-linear Mamba-2: the block of `Mamba2` with O(log t) states, each read with a weight of its own.

        lambda_t^l = softplus(m^l (W_l x_t)^l),   l = 0, ..., L                          (h (L + 1))
        o_t = sum_{s <= t} lambda_t^{l(t, s)} (C_t^T B_s) exp(-sum_{s < r <= t} dt_r exp(log_a)) dt_s u_s
        y   = W_out RMSNorm((o_t + D u_t) silu(z))

    with the rest as in `Mamba2`, from Guo et al. 2025 (arXiv:2506.04761). With positions from 0 in a segment, l(t, t) = 0, and otherwise
    l(t, s) is the number of the highest bit in which t and s differ, counted from 1: recent tokens are in small buckets,
    distant ones in large buckets. m starts at 1. Work is O(t log t) and the state has L matrices per head. Beyond
    2^L tokens a segment begins anew every 2^L tokens.
    """

    def __init__(self, config: LogLinearMamba2Config, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        features = config.heads * (config.levels + 1)
        self.level = linear(
            config.width, features, axes=("embed", "heads"), bias=config.bias, dtype=config.dtype, rngs=rngs
        )
        ones = nnx.initializers.ones_init()
        shape = (config.heads, config.levels + 1)
        self.level_scale = parameter(rngs, ones, shape, axes=("heads", None), **NO_DECAY)

    def initial(self, batch_size: int, max_length: int | None) -> Mamba2Carry:
        inputs, s = super().initial(batch_size, max_length)
        memories = jnp.repeat(s[:, None], self.config.levels, axis=1)
        return Mamba2Carry(inputs, LevelStates(memories, jnp.zeros((batch_size,), jnp.int32)))

    def _read(self, x, query, key, value, log_decay, s, segments):
        weights = self.level(x).astype(jnp.float32).reshape(*x.shape[:2], *self.level_scale.shape)
        weights = jax.nn.softplus(self.level_scale[...][None, None] * weights)
        return level_attention(
            query, key, value, weights, log_decay=log_decay, initial_state=s, segment_ids=segments
        )
