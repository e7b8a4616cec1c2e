"""RG-LRU: Griffin's recurrent block, a gated linear recurrence beside a GELU branch (De et al. 2024, arXiv:2402.19427)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layers.kernels.linear_recurrence import linear_recurrence
from layers.mixer import Mixer
from layers.options import ActivationDtype, checked_dataclass
from layers.parameters import NO_DECAY, linear, parameter
from layers.parts.short_convolution import ShortConvolution
from layers.parts.step_size import inverse_softplus
from layers.segments import Segments, Visit, initial_place, keep_where, visit
from layers.typing import Array, Float

# The decay per token is sigmoid(...) raised to a power of at most this.
POWER = 8.0
STEEPEST = 1000.0


@checked_dataclass
class RGLRUConfig:
    """Options of `RGLRU`.

    Attributes:
      width: d, number of input and output features.
      state_size: e, number of channels of the recurrence. If None, equals width.
      heads: number of blocks on the diagonal of the gates' matrices; divides the state size.
      taps: w, number of inputs that the short convolution sees.
      r_min, r_max: radii of the ring in which the base decays start, uniform by area.
      depth: number of layers of the model; the output projection starts with variance 2 / (e depth).
      dtype: dtype of the activations; the state is float32.
    """

    width: int
    state_size: int | None = None
    heads: int = 8
    taps: int = 4
    r_min: float = 0.9
    r_max: float = 0.999
    depth: int = 1
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        if self.channels % self.heads:
            raise ValueError(f"heads={self.heads} does not divide the {self.channels} channels of the state")
        if not 0 < self.r_min < self.r_max < 1:
            raise ValueError(f"r_min={self.r_min}, r_max={self.r_max}; expected 0 < r_min < r_max < 1")

    @property
    def channels(self) -> int:
        """Number of channels of the recurrence."""
        return self.state_size or self.width


class RGLRUCarry(NamedTuple):
    """What `RGLRU` carries: the last inputs of the short convolution, and the state h, float32."""

    inputs: Float[Array, "b taps e"]
    h: Float[Array, "b e"]


class RGLRU(Mixer):
    """Griffin's recurrent block around the real-gated linear recurrent unit.

        u   = short_conv(W_x x)
        r_t = sigmoid(W_r u_t + b_r),  i_t = sigmoid(W_i u_t + b_i)       (e), block-diagonal matrices
        log a_t = -8 r_t softplus(lambda)
        h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * (i_t * u_t)
        y   = W_o (h * gelu(W_y x))

    The first token of a segment enters with weight 1 in place of sqrt(1 - a_t^2), and exp(-softplus(lambda)) rather than
    its eighth power starts in [r_min, r_max]: both follow the authors' code, which differs from the paper.
    """

    keeps_segments = True  # The first token of a segment has weight 1, in any call.

    def __init__(self, config: RGLRUConfig, *, rngs: nnx.Rngs):
        self.config = config
        channels, heads = config.channels, config.heads
        options = {"dtype": config.dtype, "rngs": rngs}
        self.gate = linear(config.width, channels, axes=("embed", "inner"), **options)
        self.input = linear(config.width, channels, axes=("embed", "inner"), **options)
        scaled = nnx.initializers.variance_scaling
        self.convolution = ShortConvolution(
            channels,
            config.taps,
            bias=True,
            activation=None,
            init=scaled(0.01, "fan_in", "normal"),
            **options,
        )
        blocks = (2, heads, channels // heads, channels // heads)
        # Both gates: recurrence, input.
        self.gates = parameter(
            rngs, nnx.initializers.normal(channels**-0.5), blocks, axes=(None, "heads", None, None)
        )
        self.gate_biases = parameter(
            rngs, nnx.initializers.zeros_init(), blocks[:3], axes=(None, "heads", None), **NO_DECAY
        )
        self.decay = parameter(
            rngs, _ring(config.r_min, config.r_max), (channels,), axes=("inner",), **NO_DECAY
        )
        small = scaled(2 / config.depth, "fan_in", "normal")
        self.output = linear(channels, config.width, axes=("inner", "embed"), init=small, **options)

    def initial(self, batch_size: int, max_length: int | None) -> RGLRUCarry:
        return RGLRUCarry(
            self.convolution.init_state(batch_size),
            jnp.zeros((batch_size, self.config.channels), jnp.float32),
        )

    def mix(
        self,
        x: Float[Array, "b t d"],
        carried: RGLRUCarry | None,
        segments: Segments | None,
        here: Visit | None,
    ) -> tuple[Float[Array, "b t d"], RGLRUCarry]:
        inputs = h0 = None
        if here is None:
            here = visit(initial_place(x.shape[0]), segments, x.shape[1])
        if carried is not None:
            inputs, h0 = keep_where(here.continues, carried, self.initial(x.shape[0], None))
        u, inputs = self.convolution(self.input(x), inputs, segment_ids=segments)
        log_decay, driven = self._gated(u)
        # Computes 1 - a^2 from the logarithm: a difference loses precision where a is near 1.
        weight = bounded_sqrt(-jnp.expm1(2 * log_decay))
        weight = jnp.where((here.positions == 0)[..., None], 1.0, weight)
        h, last = linear_recurrence(
            jnp.exp(log_decay), weight * driven, initial_state=h0, segment_ids=segments
        )
        y = self.output(h.astype(self.config.dtype) * jax.nn.gelu(self.gate(x)))
        return y, RGLRUCarry(inputs, last)

    def _gated(self, u):
        """Returns the logarithm of the decay and the gated input, in float32."""
        config = self.config
        blocks = u.reshape(*u.shape[:2], config.heads, config.channels // config.heads)
        logits = jnp.einsum(
            "bthi,chij->cbthj",
            blocks,
            self.gates[...].astype(config.dtype),
            preferred_element_type=jnp.float32,
        )
        opened = jax.nn.sigmoid(logits + self.gate_biases[...][:, None, None]).reshape(2, *u.shape)
        rate = POWER * jax.nn.softplus(self.decay[...])
        return -rate[None, None] * opened[0], opened[1] * u


@jax.custom_jvp
def bounded_sqrt(x: jax.Array) -> jax.Array:
    """Returns the square root, with its derivative bounded by 1000: it would diverge for a decay near 1."""
    return jnp.sqrt(x)


@bounded_sqrt.defjvp
def _bounded_sqrt_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return jnp.sqrt(x), dx * (0.5 * jax.lax.rsqrt(jnp.maximum(x, 1 / (4 * STEEPEST**2))))


def _ring(inner: float, outer: float):
    """Initializer of lambda: exp(-softplus(lambda)) has the distribution of radii of points uniform by area in a ring."""

    def init(key, shape, dtype):
        area = jax.random.uniform(key, shape, dtype, inner**2, outer**2)
        return inverse_softplus(-0.5 * jnp.log(area))

    return init
