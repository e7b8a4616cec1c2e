"""mLSTM: xLSTM's matrix memory with exponential input gates and a normalizer (Beck et al. 2024, arXiv:2405.04517)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layers.kernels.gated_linear_attention import gated_linear_attention
from layers.mixer import Mixer
from layers.options import ActivationDtype, NonNegative, checked_dataclass
from layers.parameters import NO_DECAY, declared, linear, parameter
from layers.parts.heads import HeadLayerNorm, split_heads
from layers.parts.running_maximum import EMPTY, running_maximum
from layers.parts.short_convolution import ShortConvolution
from layers.segments import Segments
from layers.typing import Array, Float

# Added to the denominator, as in the authors' code.
SMALL = 1e-6


@checked_dataclass
class MLSTMConfig:
    """Options of `MLSTM`.

    Attributes:
      width: d, number of input and output features.
      heads: h, number of heads.
      expand: e / d, channels inside per feature.
      block: features of the blocks of the block-diagonal maps to queries, keys and values; divides e.
      taps: number of taps of the short convolution before queries and keys, 2 to 8.
      epsilon: epsilon of the norm per head.
      depth: number of layers of the model; W_o starts smaller in deeper ones.
      dtype: dtype of the activations; gates and state are float32.
    """

    width: int
    heads: int = 4
    expand: int = 2
    block: int = 4
    taps: int = 4
    epsilon: NonNegative = 1e-5
    depth: int = 1
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        for name, size in (("heads", self.heads), ("block", self.block)):
            if self.channels % size:
                raise ValueError(f"{name}={size} does not divide expand * width = {self.channels}")

    @property
    def channels(self) -> int:
        """e, number of channels inside."""
        return self.expand * self.width


class MLSTMCarry(NamedTuple):
    """What `MLSTM` carries, float32.

    Attributes:
      inputs: the last inputs of its convolution.
      memory: C and, in the last column, n; both divided by exp(top).
      top: m, the logarithm of the largest weight that the memory has.
    """

    inputs: Float[Array, "b w-1 e"]
    memory: Float[Array, "b h k w"]
    top: Float[Array, "b h"]


class MLSTM(Mixer):
    """mLSTM: the block of xLSTM around a matrix memory (Beck et al. 2024, arXiv:2405.04517).

        [u, z] = W_in x,   c = silu(conv(u)),   q, k, v = B_q c, B_k c, B_v u       block-diagonal B; (e) each
        log i = w_i [q, k, v] + b_i,   log f = log_sigmoid(w_f [q, k, v] + b_f)     (h)
        C_t = f_t C_{t-1} + i_t k_t v_t^T,   n_t = f_t n_{t-1} + i_t k_t            per head
        o_t = C_t^T q_t / max(|n_t^T q_t|, sqrt(K)),                                K = e / h
        y = W_out ((LayerNorm(o) + s * c) * silu(z))                                norm per head

    The input gate i is an exponential and has no bound. Memory and normalizer are therefore kept relative to exp(m_t), with
    m_t = max(log f_t + m_{t-1}, log i_t); the result does not depend on m, so no gradient flows through it. The authors
    divide keys by sqrt(K), with 1 in place of sqrt(K) above, and add 1e-6 to the denominator relative to exp(m_t), as is
    done here. b_f starts at 3 to 6, head by head, and b_i normal with deviation 0.1.
    """

    def __init__(self, config: MLSTMConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, channels, block = config.width, config.channels, config.block
        options = {"bias": False, "dtype": config.dtype, "rngs": rngs}
        normal, zeros = nnx.initializers.normal, nnx.initializers.zeros_init()
        small = normal((2 / (5 * width)) ** 0.5)
        self.input = linear(width, 2 * channels, axes=("embed", "inner"), init=small, **options)
        self.convolution = ShortConvolution(channels, config.taps, bias=True, dtype=config.dtype, rngs=rngs)
        blocks = (3, channels // block, block, block)
        self.projections = parameter(rngs, small, blocks, axes=(None, "inner", None, None))
        self.gates = parameter(rngs, zeros, (3 * channels, 2 * config.heads), axes=(None, "heads"))
        drawn = 0.1 * jax.random.normal(rngs.params(), (config.heads,), jnp.float32)
        opened = jnp.linspace(3.0, 6.0, config.heads, dtype=jnp.float32)
        self.gate_bias = declared(jnp.concatenate([drawn, opened]), axes=("heads",), **NO_DECAY)
        size = channels // config.heads
        self.norm = HeadLayerNorm(config.heads, size, epsilon=config.epsilon, bias=False, rngs=rngs)
        ones = nnx.initializers.ones_init()
        self.skip = parameter(rngs, ones, (channels,), axes=("inner",), **NO_DECAY)
        last = normal(2 / config.depth / width**0.5)
        self.output = linear(channels, width, axes=("inner", "embed"), init=last, **options)

    def initial(self, batch_size: int, max_length: int | None) -> MLSTMCarry:
        config = self.config
        size = config.channels // config.heads
        return MLSTMCarry(
            self.convolution.init_state(batch_size),
            jnp.zeros((batch_size, config.heads, size, size + 1), jnp.float32),
            jnp.full((batch_size, config.heads), EMPTY, jnp.float32),
        )

    def mix(
        self, x: Float[Array, "b t d"], carried: MLSTMCarry | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], MLSTMCarry]:
        config = self.config
        inputs, memory, top = self.initial(x.shape[0], None) if carried is None else carried
        u, z = jnp.split(self.input(x), 2, axis=-1)
        c, inputs = self.convolution(u, inputs, segment_ids=segments)
        q, k, v = (self._project(i, part) for i, part in enumerate((c, c, u)))
        gates = jnp.concatenate([q, k, v], axis=-1).astype(config.dtype)
        gates = jnp.matmul(gates, self.gates[...].astype(config.dtype), preferred_element_type=jnp.float32)
        log_in, log_forget = jnp.split(gates + self.gate_bias[...][None, None], 2, axis=-1)
        q, k, v = (split_heads(part, config.heads) for part in (q, k, v))
        o, memory, top = recall(q, k, v, log_in, jax.nn.log_sigmoid(log_forget), memory, top, segments)
        y = (self.norm(o) + self.skip[...][None, None] * c) * jax.nn.silu(z.astype(jnp.float32))
        return self.output(y.astype(config.dtype)), MLSTMCarry(inputs, memory, top)

    def _project(self, which: int, x: jax.Array) -> jax.Array:
        """Returns the queries, keys or values: each block of features mapped by its own matrix."""
        matrices = self.projections[which].astype(self.config.dtype)
        blocks = x.reshape(*x.shape[:2], *matrices.shape[:2])
        return jnp.einsum("btni,nij->btnj", blocks, matrices).reshape(x.shape)


def recall(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    log_in: Float[Array, "b t h"],
    log_forget: Float[Array, "b t h"],
    memory: Float[Array, "b h k w"],
    top: Float[Array, "b h"],
    segments: Segments | None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k w"], Float[Array, "b h"]]:
    """Returns what queries find in the matrix memory, over their normalizers, and the memory and its logarithm at the end.

    Args:
      q, k, v: queries, keys and values of each head.
      log_in, log_forget: logarithms of the gates.
      memory, top: as in `MLSTMCarry`.
      segments: the memory is empty where a segment begins.
    """
    weight, log_decay, tops = relative_gates(log_in, log_forget, top, segments)
    sums, memory = gated_linear_attention(
        q,
        (weight[..., None] * k).astype(k.dtype),
        jnp.concatenate([v, jnp.ones((*v.shape[:3], 1), v.dtype)], axis=-1),
        log_decay=log_decay,
        initial_state=memory,
        segment_ids=segments,
    )
    sums = sums.astype(jnp.float32)
    least = jnp.exp(-jnp.maximum(tops, -80.0))
    o = sums[..., :-1] / (jnp.maximum(jnp.abs(sums[..., -1:]), least[..., None]) + SMALL)
    return o, memory, jnp.concatenate([top[:, None], tops], axis=1)[:, -1]


def relative_gates(
    log_in: Float[Array, "b t h"],
    log_forget: Float[Array, "b t h"],
    top: Float[Array, "b h"],
    segments: Segments | None,
) -> tuple[Float[Array, "b t h"], Float[Array, "b t h"], Float[Array, "b t h"]]:
    """Returns exp(log i_t - m_t), log f_t + m_{t-1} - m_t <= 0, and m_t, the running maximum that keeps both in range.

    Args:
      log_in, log_forget: logarithms of the gates.
      top: m_0, `EMPTY` before the first token.
      segments: m starts anew with each segment.
    """
    steps, starts = log_forget, None
    if segments is not None:
        real = segments.real[..., None]
        log_in, steps = jnp.where(real, log_in, EMPTY), jnp.where(real, log_forget, 0)
        starts = segments.starts[..., None] if segments.packed else None
    tops = jax.lax.stop_gradient(running_maximum(log_in, steps, starts, top))
    before = jnp.concatenate([top[:, None], tops], axis=1)[:, : tops.shape[1]]
    fresh = before <= EMPTY / 2
    if starts is not None:
        fresh = fresh | starts
    # The bound on the constant part keeps the sum at most 0 in spite of rounding, and its derivative by the gate 1.
    change = jax.lax.stop_gradient(jnp.minimum(before - tops, -steps))
    log_decay = jnp.where(fresh, 0, steps + change)
    weight = jnp.where(log_in <= EMPTY / 2, 0, jnp.exp(log_in - tops))
    return weight, log_decay, tops
