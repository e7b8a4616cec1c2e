"""Gated DeltaNet-2: a delta rule with gates of its own for what is erased and what is written (arXiv:2605.22791)."""

import jax
import jax.numpy as jnp
from flax import nnx

from layers.kernels.delta_rule import dplr_delta_rule
from layers.mixer import Mixer
from layers.options import checked_dataclass
from layers.parameters import linear
from layers.parts.delta_memory import DeltaCarry, SharedKeysConfig
from layers.parts.heads import HeadNorm, head_size, split_heads
from layers.parts.log_decay import SoftplusDecay
from layers.parts.low_rank import LowRank
from layers.parts.short_convolution import ShortConvolution
from layers.segments import Segments
from layers.typing import Array, Float


@checked_dataclass
class GatedDeltaNet2Config(SharedKeysConfig):
    """Options of `GatedDeltaNet2`: those of `SharedKeysConfig` and more.

    Attributes:
      negative_eigenvalues: whether the gates of what is erased lie in (0, 2) instead of (0, 1).
      key_dim: K, features per query and key head; width / heads if None.
      value_dim: V, features per value head, and the rank of the maps to decay and output gate; width / heads if None.
    """

    negative_eigenvalues: bool = False
    key_dim: int | None = None
    value_dim: int | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        """K and V."""
        return head_size("key_dim", self.key_dim, self), head_size("value_dim", self.value_dim, self)


class GatedDeltaNet2(Mixer):
    """Gated DeltaNet-2: decay, erasure and writing each have a gate per channel (arXiv:2605.22791).

        q, k, v = silu(conv(W_q x)), silu(conv(W_k x)), silu(conv(W_v x)),   then q and k of norm 1
        e = sigmoid(W_e x), per key channel,   w = sigmoid(W_w x), per value channel
        log alpha = -exp(a) softplus(F_2 F_1 x + c)                                 a: (g), F_1: (V, d)
        S' = Diag(alpha_t) S_{t-1},   S_t = S' + k_t (w_t * v_t - S'^T (e_t * k_t))^T,   o_t = S_t^T q_t / sqrt(K)
        y = W_o (RMSNorm(o) * sigmoid(G_2 G_1 x + b))                               norm per head

    With e = w = beta it is Kimi Delta Attention. It runs as the diagonal-plus-low-rank rule, which reads the old state
    at alpha * e * k. exp(a) starts uniform in [1, 16] and softplus(c) log-uniform in [0.001, 0.1].
    """

    def __init__(self, config: GatedDeltaNet2Config, *, rngs: nnx.Rngs):
        self.config = config
        key_dim, value_dim = config.sizes
        keys, values = config.heads * key_dim, config.outputs * value_dim
        options = {"dtype": config.dtype, "rngs": rngs}
        into = {"axes": ("embed", "heads"), "bias": False, **options}
        self.projection = linear(config.width, 2 * keys + values, **into)
        self.convolution = ShortConvolution(2 * keys + values, config.taps, **options)
        self.erase = linear(config.width, keys, **into)
        self.write = linear(config.width, values, **into)
        self.rate = LowRank(config.width, value_dim, keys, bias=False, **options)
        self.decay = SoftplusDecay(config.heads, key_dim, rates=(1.0, 16.0), rngs=rngs)
        self.gate = LowRank(config.width, value_dim, values, **options)
        self.norm = HeadNorm(value_dim, gate="sigmoid", epsilon=config.epsilon, **options)
        self.output = linear(values, config.width, axes=("heads", "embed"), bias=False, **options)

    def initial(self, batch_size: int, max_length: int | None) -> DeltaCarry:
        memory = (batch_size, self.config.outputs, *self.config.sizes)
        return DeltaCarry(jnp.zeros(memory, jnp.float32), self.convolution.init_state(batch_size))

    def mix(
        self, x: Float[Array, "b t d"], carried: DeltaCarry | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], DeltaCarry]:
        config = self.config
        memory, inputs = (None, None) if carried is None else carried
        features, inputs = self.convolution(self.projection(x), inputs, segment_ids=segments)
        keys, group = config.heads * config.sizes[0], config.outputs // config.heads
        q, k, v = jnp.split(features.astype(jnp.float32), [keys, 2 * keys], axis=-1)
        erase = (2.0 if config.negative_eigenvalues else 1.0) * _opened(self.erase(x))
        by_key_head = _unit(split_heads(q, config.heads)), _unit(split_heads(k, config.heads))
        by_key_head += split_heads(erase, config.heads), self.decay(split_heads(self.rate(x), config.heads))
        q, k, erase, log_decay = (jnp.repeat(part, group, axis=2) for part in by_key_head)
        v = split_heads(v * _opened(self.write(x)), config.outputs)
        read = jnp.exp(log_decay) * erase * k
        o, memory = dplr_delta_rule(
            *(part.astype(config.dtype) for part in (q, k, v, read, -k)),
            log_decay=log_decay,
            initial_state=memory,
            segment_ids=segments,
        )
        return self.output(self.norm(o, self.gate(x))), DeltaCarry(memory, inputs)


def _opened(logits: jax.Array) -> jax.Array:
    """Returns gates in float32."""
    return jax.nn.sigmoid(logits.astype(jnp.float32))


def _unit(x: Float[Array, "b t h k"]) -> Float[Array, "b t h k"]:
    """Returns x over its norm, which 1e-6 keeps from zero, as `delta_rule` does."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-6)
