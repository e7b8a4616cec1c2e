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
from layers.typing import Array, Float, Num


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
            pairs = c.reshape(*x.shape, 2)
            c = jax.lax.complex(pairs[..., 0], pairs[..., 1])
            theta = self.theta[...][None, None]
            decay = decay.astype(jnp.complex64) * jax.lax.complex(jnp.cos(theta), jnp.sin(theta))
            complement = complement.astype(jnp.complex64)
        h, last = linear_recurrence(decay, complement * c, initial_state=carried, segment_ids=segments)
        if config.state == "complex":
            h = jnp.concatenate([h.real, h.imag], axis=-1)
        return self.output(self.norm(h) * jax.nn.silu(self.gate(x))), last
