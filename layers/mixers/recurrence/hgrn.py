"""HGRN: a gated linear recurrence that forgets less in deeper layers (Qin et al. 2023, arXiv:2311.04823)."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.kernels.linear_recurrence import linear_recurrence
from layers.mixer import Mixer
from layers.norms import make_norm
from layers.options import ActivationDtype, Count, NonNegative, checked_dataclass
from layers.parameters import NO_DECAY, Constant, declared, linear
from layers.segments import Segments
from layers.typing import Array, Float, Int, Num


@checked_dataclass
class HGRNConfig:
    """Options of `HGRN`.

    Attributes:
      width: d, number of input and output features.
      state: "complex" for states that also rotate, each by its own angle, or "real".
      norm: norm of the states before the gate, "layer_norm" or "rms_norm".
      bias: whether the projections have biases.
      epsilon: epsilon of the norm.
      layer, depth: index of the layer, from 0, and number of layers of the model; the lower bound of the decay starts at
        layer / depth.
      dtype: dtype of the activations; the state is float32 or complex64.
    """

    width: int
    state: Literal["complex", "real"] = "complex"
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    bias: bool = True
    epsilon: NonNegative = 1e-5
    layer: Count = 0
    depth: int = 1
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        if not 0 <= self.layer < self.depth:
            raise ValueError(f"layer={self.layer}, depth={self.depth}; expected 0 <= layer < depth")

    @property
    def parts(self) -> int:
        """Real numbers per state: 2 if the state is complex."""
        return 2 if self.state == "complex" else 1


class HGRN(Mixer):
    """The token mixer of the hierarchically gated recurrent network.

        lambda_t = bound + (1 - bound) sigmoid(W_f x_t)                   (d)
        c_t = silu(W_i x_t)                                               (d complex numbers, or real ones)
        h_t = lambda_t exp(i theta) * h_{t-1} + (1 - lambda_t) * c_t      (theta = 0 if real)
        y_t = W_o (norm([Re h_t, Im h_t]) * silu(W_g x_t))

    theta starts at 10000^(-2 k / d) for channel k. W_i gives real and imaginary parts alternately.

    The paper computes the bounds of all layers from one matrix, by a softmax and a cumulative sum over depth. Here each
    layer has its own bound, sigmoid(bound_logit), with the paper's initial values: 0 in the first layer, where it is
    fixed, and layer / depth in the others. Trained bounds need not grow with depth.
    """

    def __init__(self, config: HGRNConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, features = config.width, config.parts * config.width
        options = {"axes": ("embed", "inner"), "bias": config.bias, "dtype": config.dtype, "rngs": rngs}
        self.input = linear(width, features, **options)
        self.forget = linear(width, width, **options)
        self.gate = linear(width, features, **options)
        self.output = linear(features, width, **options | {"axes": ("inner", "embed")})
        self.norm = make_norm(
            config.norm, {"epsilon": config.epsilon}, width=features, dtype=config.dtype, rngs=rngs
        )
        if config.state == "complex":
            angles = 10_000.0 ** (-2 * np.arange(width) / width)
            self.theta = declared(jnp.asarray(angles, jnp.float32), axes=("inner",), **NO_DECAY)
        # The first layer has no bound but keeps the same parameters as the others.
        start = max(config.layer, 1) / max(config.depth, 2)
        logit = jnp.full(width, np.log(start / (1 - start)), jnp.float32)
        self.bound_logit = declared(logit, axes=("inner",), **NO_DECAY)
        self.bounded = Constant(jnp.float32(config.layer > 0))

    def initial(self, batch_size: int, max_length: int | None) -> Num[Array, "b d"]:
        dtype = jnp.complex64 if self.config.state == "complex" else jnp.float32
        return jnp.zeros((batch_size, self.config.width), dtype)

    def mix(
        self, x: Float[Array, "b t d"], carried: Num[Array, "b d"] | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], Num[Array, "b d"]]:
        config = self.config
        bound = (self.bounded[...] * jax.nn.sigmoid(self.bound_logit[...]))[None, None]
        logits = self.forget(x).astype(jnp.float32)
        # Computes 1 - lambda as a product: a difference loses precision where lambda is near 1.
        decay, complement = (
            bound + (1 - bound) * jax.nn.sigmoid(logits),
            (1 - bound) * jax.nn.sigmoid(-logits),
        )
        c = jax.nn.silu(self.input(x)).astype(jnp.float32)
        if config.state == "complex":
            h, last = self._turning(decay, complement, c, carried, segments)
        else:
            h, last = linear_recurrence(decay, complement * c, initial_state=carried, segment_ids=segments)
        return self.output(self.norm(h) * jax.nn.silu(self.gate(x))), last

    def _turning(self, decay, complement, c, carried, segments):
        """Returns real and imaginary parts of the states, (b, t, 2 d), and the last state.

        All states of a channel turn by the same angle per token, so that exp(-i n theta) h_n after n tokens has a recurrence
        with the real decay lambda alone, for real and imaginary parts by themselves.
        """
        batch, time, width = decay.shape
        if segments is None:
            count, total = jnp.arange(1, time + 1)[None], jnp.full((1, 1), time)
        else:
            count, total = jnp.cumsum(segments.real, axis=1), segments.real.sum(1, keepdims=True)
        angles, end = _angles(self.theta[...], count), _angles(self.theta[...], total)[:, 0]
        cosine, sine = jnp.cos(angles), jnp.sin(angles)
        pairs = c.reshape(batch, time, width, 2)
        real, imaginary = complement * pairs[..., 0], complement * pairs[..., 1]
        x = jnp.concatenate([cosine * real + sine * imaginary, cosine * imaginary - sine * real], axis=-1)
        state = None if carried is None else jnp.concatenate([carried.real, carried.imag], axis=-1)
        h, last = linear_recurrence(
            jnp.concatenate([decay, decay], axis=-1), x, initial_state=state, segment_ids=segments
        )

        def turned(h, cosine, sine):
            real, imaginary = jnp.split(h, 2, axis=-1)
            return cosine * real - sine * imaginary, sine * real + cosine * imaginary

        last = jax.lax.complex(*turned(last, jnp.cos(end), jnp.sin(end)))
        return jnp.concatenate(turned(h, cosine, sine), axis=-1), last


def _angles(theta: Float[Array, "d"], count: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """Returns count * theta, up to whole turns.

    Products of integers, in 2^-32 of a turn, wrap around exactly; those of floats would lose digits to the whole turns.
    """
    whole = jax.lax.stop_gradient(theta)
    part = whole / (2 * np.pi) - jnp.round(whole / (2 * np.pi))
    units = count.astype(jnp.int32)[..., None] * jnp.round(part * 2.0**32).astype(jnp.int32)[None, None]
    wrapped = units.astype(jnp.float32) * (2 * np.pi / 2.0**32)
    return wrapped + (theta - whole)[None, None] * count.astype(jnp.float32)[..., None]
