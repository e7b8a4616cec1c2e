"""GLA: linear attention whose state forgets by a learned gate per key channel (Yang et al. 2023, arXiv:2312.06635)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layers.kernels.gated_linear_attention import gated_linear_attention
from layers.mixer import Mixer
from layers.options import ActivationDtype, NonNegative, Positive, checked_dataclass
from layers.parameters import linear, xavier_uniform
from layers.parts.heads import HeadNorm, SharedHeads, head_size, split_heads
from layers.parts.low_rank import LowRank
from layers.parts.short_convolution import ShortConvolution
from layers.segments import Segments
from layers.typing import Array, Float


@checked_dataclass
class GLAConfig(SharedHeads):
    """Options of `GLA`.

    Attributes:
      width: d, number of input and output features.
      heads: h, number of query heads.
      kv_heads: g, number of heads of keys, values and decays; divides h. If None, equals h. Head i of h uses head i // (h
        / g).
      key_dim: K, features per query and key head; width / (2 heads) if None.
      value_dim: V, features per value head; width / heads if None.
      taps: number of inputs that the short convolutions of queries, keys and values see, 2 to 8; None for no convolutions.
      gate_rank: rank of the map that computes the decays.
      temperature: tau; the decays are the tau-th root of a sigmoid, so that they start near 1.
      epsilon: epsilon of the norm per head.
      dtype: dtype of the activations; decays and state are float32.
    """

    width: int
    heads: int = 4
    kv_heads: int | None = None
    key_dim: int | None = None
    value_dim: int | None = None
    taps: int | None = None
    gate_rank: int = 16
    temperature: Positive = 16.0
    epsilon: NonNegative = 1e-5
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        _ = self.sizes, self.groups

    @property
    def sizes(self) -> tuple[int, int]:
        """K and V."""
        return head_size("key_dim", self.key_dim, self, 0.5), head_size("value_dim", self.value_dim, self)


class GLACarry(NamedTuple):
    """What `GLA` carries: the matrix memory per head, float32, and the last inputs of its convolutions, if any."""

    memory: Float[Array, "b h k v"]
    inputs: Float[Array, "b w-1 n"] | None


class GLA(Mixer):
    """GLA: gated linear attention (Yang et al. 2023, arXiv:2312.06635).

        q, k, v = W_q x, W_k x, W_v x                                  with taps, silu(conv(.)) of each
        alpha = sigmoid(W_2 W_1 x + b)^(1 / tau)                       (g, K), W_1: (gate_rank, d)
        S_t = Diag(alpha_t) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)   per head
        y = W_o (RMSNorm(o) * silu(W_g x))                             norm per head

    Queries, keys and the decay's map start Xavier-uniform with gain 2^-2.5 as in the authors' first code; the norm and
    the gate without bias are those of their later layer, as are the convolutions and shared keys and values.
    """

    def __init__(self, config: GLAConfig, *, rngs: nnx.Rngs):
        self.config = config
        key_dim, value_dim = config.sizes
        queries, values = config.heads * key_dim, config.heads * value_dim
        keys, shared_values = config.groups * key_dim, config.groups * value_dim
        options = {"axes": ("embed", "heads"), "bias": False, "dtype": config.dtype, "rngs": rngs}
        small = xavier_uniform(2**-2.5)
        self.query = linear(config.width, queries, init=small, **options)
        self.key = linear(config.width, keys, init=small, **options)
        self.value = linear(config.width, shared_values, **options)
        features = queries + keys + shared_values
        self.convolution = (
            ShortConvolution(features, config.taps, dtype=config.dtype, rngs=rngs) if config.taps else None
        )
        self.gate = linear(config.width, values, **options)
        self.decay = LowRank(
            config.width, config.gate_rank, keys, init=(small, small), dtype=config.dtype, rngs=rngs
        )
        self.norm = HeadNorm(value_dim, gate="silu", epsilon=config.epsilon, dtype=config.dtype, rngs=rngs)
        self.output = linear(values, config.width, **options | {"axes": ("heads", "embed")})

    def initial(self, batch_size: int, max_length: int | None) -> GLACarry:
        return GLACarry(
            jnp.zeros((batch_size, self.config.heads, *self.config.sizes), jnp.float32),
            None if self.convolution is None else self.convolution.init_state(batch_size),
        )

    def mix(
        self, x: Float[Array, "b t d"], carried: GLACarry | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], GLACarry]:
        config = self.config
        memory, inputs = (None, None) if carried is None else carried
        log_decay = jax.nn.log_sigmoid(self.decay(x)) / config.temperature
        qkv = self.query(x), self.key(x), self.value(x)
        if self.convolution is not None:
            ends = (qkv[0].shape[2], qkv[0].shape[2] + qkv[1].shape[2])
            joined, inputs = self.convolution(jnp.concatenate(qkv, axis=-1), inputs, segment_ids=segments)
            qkv = jnp.split(joined, ends, axis=-1)
        heads = (config.heads, config.groups, config.groups)
        q, k, v = (split_heads(part, count) for part, count in zip(qkv, heads, strict=True))
        log_decay = jnp.repeat(split_heads(log_decay, config.groups), config.heads // config.groups, axis=2)
        o, memory = gated_linear_attention(
            q, k, v, log_decay=log_decay, initial_state=memory, segment_ids=segments
        )
        return self.output(self.norm(o, self.gate(x))), GLACarry(memory, inputs)
