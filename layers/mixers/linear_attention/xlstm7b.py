"""xLSTM 7B's mLSTM: a matrix memory with exponential, bounded gates and no layer inside (Beck et al. 2025, arXiv:2503.13427)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layers.mixer import Mixer
from layers.mixers.linear_attention.mlstm import recall
from layers.options import ActivationDtype, NonNegative, Positive, checked_dataclass
from layers.parameters import linear
from layers.parts.heads import HeadLayerNorm, head_size, split_heads
from layers.parts.running_maximum import EMPTY
from layers.segments import Segments
from layers.typing import Array, Float


@checked_dataclass
class XLSTM7BConfig:
    """Options of `XLSTM7B`.

    Attributes:
      width: d, number of input and output features.
      heads: h, number of heads.
      key_dim: K, features of queries and keys per head; half of width / heads if None.
      value_dim: V, features of values per head; width / heads if None.
      gate_cap: a, bound of the gates before their functions, applied by tanh; None for none.
      epsilon: epsilon of the norm per head.
      depth: number of layers of the model; W_o starts smaller in deeper ones.
      dtype: dtype of the activations; gates and state are float32.
    """

    width: int
    heads: int = 8
    key_dim: int | None = None
    value_dim: int | None = None
    gate_cap: Positive | None = 15.0
    epsilon: NonNegative = 1e-6
    depth: int = 1
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        _ = self.sizes

    @property
    def sizes(self) -> tuple[int, int]:
        """K and V."""
        key = head_size("key_dim", self.key_dim, self, part=0.5)
        return key, head_size("value_dim", self.value_dim, self)


class XLSTM7BCarry(NamedTuple):
    """What `XLSTM7B` carries, float32: the memory and the logarithm of its scale, as in `MLSTMCarry`."""

    memory: Float[Array, "b h k w"]
    top: Float[Array, "b h"]


class XLSTM7B(Mixer):
    """The mLSTM layer of xLSTM 7B (Beck et al. 2025, arXiv:2503.13427).

        q, k, v = W_q x, W_k x, W_v x                                                       (h K, h K, h V)
        log i = c(w_i x + b_i),   log f = log_sigmoid(c(w_f x + b_f)),   c(z) = a tanh(z / a)       (h)
        C_t = f_t C_{t-1} + i_t k_t v_t^T,   n_t = f_t n_{t-1} + i_t k_t                    per head
        o_t = C_t^T q_t / max(|n_t^T q_t|, sqrt(K))
        y = W_o (sigmoid(W_g x) * LayerNorm(o))                                             norm per head

    Memory and normalizer are kept as in `MLSTM`. The block has gated linear units of its own after this layer, and neither a
    convolution nor an expansion here. The gates start at b alone, with b_i = -10 and b_f from 3 to 6, head by head.
    """

    def __init__(self, config: XLSTM7BConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, heads, (key, value) = config.width, config.heads, config.sizes
        small = nnx.initializers.normal((2 / (5 * width)) ** 0.5)
        options = {"axes": ("embed", "heads"), "bias": False, "dtype": config.dtype, "rngs": rngs}
        self.query = linear(width, heads * key, init=small, **options)
        self.key = linear(width, heads * key, init=small, **options)
        self.value = linear(width, heads * value, init=small, **options)
        self.gate = linear(width, heads * value, init=small, **options)
        zeros = nnx.initializers.zeros_init()
        self.gates = linear(width, 2 * heads, init=zeros, **options | {"bias": True, "dtype": jnp.float32})
        opened = jnp.linspace(3.0, 6.0, heads, dtype=jnp.float32)
        self.gates.bias[...] = jnp.concatenate([jnp.full((heads,), -10.0, jnp.float32), opened])
        self.norm = HeadLayerNorm(heads, value, epsilon=config.epsilon, bias=False, rngs=rngs)
        last = nnx.initializers.normal(2 / config.depth / width**0.5)
        self.output = linear(heads * value, width, init=last, **options | {"axes": ("heads", "embed")})

    def initial(self, batch_size: int, max_length: int | None) -> XLSTM7BCarry:
        heads, (key, value) = self.config.heads, self.config.sizes
        return XLSTM7BCarry(
            jnp.zeros((batch_size, heads, key, value + 1), jnp.float32),
            jnp.full((batch_size, heads), EMPTY, jnp.float32),
        )

    def mix(
        self, x: Float[Array, "b t d"], carried: XLSTM7BCarry | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], XLSTM7BCarry]:
        config = self.config
        memory, top = self.initial(x.shape[0], None) if carried is None else carried
        gates = self.gates(x)
        if config.gate_cap is not None:
            gates = config.gate_cap * jnp.tanh(gates / config.gate_cap)
        log_in, log_forget = jnp.split(gates, 2, axis=-1)
        q, k, v = (split_heads(f(x), config.heads) for f in (self.query, self.key, self.value))
        o, memory, top = recall(q, k, v, log_in, jax.nn.log_sigmoid(log_forget), memory, top, segments)
        y = self.norm(o) * jax.nn.sigmoid(self.gate(x).astype(jnp.float32))
        return self.output(y.astype(config.dtype)), XLSTM7BCarry(memory, top)
