"""HyperMixer: a token-mixing MLP whose weights are computed from the tokens (Mai et al. 2022, arXiv:2203.03691)."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from layers.mixer import Mixer
from layers.norms import LayerNorm, LayerNormConfig
from layers.options import ActivationDtype, NonNegative, checked_dataclass
from layers.parameters import parameter
from layers.parts.each_segment import mix_each_segment
from layers.positions import sinusoidal
from layers.segments import Segments
from layers.typing import Array, Float

# Xavier with the gain of the authors' code, sqrt(2), for the matrix of each head.
_xavier = nnx.initializers.variance_scaling(2.0, "fan_avg", "uniform", batch_axis=(0,))


@checked_dataclass
class HyperMixerConfig:
    """Options of `HyperMixer`.

    Attributes:
      width: d, number of input and output features.
      hidden: m, number of hidden units of the token-mixing MLP over all heads.
      heads: h, number of heads; each mixes its part of the features with its part of the hidden units.
      tied: whether W2 equals W1.
      position: "sinusoid" adds sinusoids to the inputs of the MLPs that compute the weights; with "none" the mixer
        ignores order.
      norm: whether LayerNorm follows the mixing.
      epsilon: epsilon of that norm.
      dtype: dtype of the activations; hidden units are summed over time in float32.
    """

    width: int
    hidden: int = 512
    heads: int = 1
    tied: bool = False
    position: Literal["sinusoid", "none"] = "sinusoid"
    norm: bool = True
    epsilon: NonNegative = 1e-5
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        for name in ("width", "hidden"):
            size = getattr(self, name)
            if size % self.heads:
                raise ValueError(f"heads={self.heads} does not divide {name}={size}")


class HyperMixer(Mixer):
    """HyperMixer: an MLP over time with generated weights (Mai et al. 2022, arXiv:2203.03691).

        W1 = MLP_1(x + p),  W2 = MLP_2(x + p)        t x m, token by token; MLP(u) = B gelu(A u)
        y = LayerNorm(W2 gelu(W1^T x))

    Linear in t, for sequences of any length, and not causal. With several heads all matrices are block diagonal.
    """

    patterns = ("noncausal_self",)
    causal = False

    def __init__(self, config: HyperMixerConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, hidden = config.width // config.heads, config.hidden // config.heads
        count = 1 if config.tied else 2
        square, wide = ((config.heads, width, outputs) for outputs in (width, hidden))
        options = {"init": _xavier, "axes": ("heads", None, None)}
        self.inner = nnx.List(parameter(rngs, shape=square, **options) for _ in range(count))
        self.outer = nnx.List(parameter(rngs, shape=wide, **options) for _ in range(count))
        norm = LayerNormConfig(config.width, epsilon=config.epsilon, dtype=config.dtype)
        self.norm = LayerNorm(norm, rngs=rngs) if config.norm else None

    def mix(
        self, x: Float[Array, "b t d"], carried: None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], None]:
        config = self.config
        weights = [
            (i[...].astype(config.dtype), o[...].astype(config.dtype)) for i, o in zip(self.inner, self.outer)
        ]
        y = mix_each_segment(partial(_mix, config), weights, x.astype(config.dtype), segment_ids=segments)
        return (y if self.norm is None else self.norm(y)), None


def _mix(config, weights, x, _lengths):
    """Mixes each sequence on its own; x is zero from its length on, so those rows of W1 do not count."""
    b, t, _ = x.shape
    source = x
    if config.position == "sinusoid":
        source = x + sinusoidal(jnp.arange(t, dtype=jnp.int32)[None], config.width).astype(x.dtype)
    heads = (b, t, config.heads, config.width // config.heads)
    source, x = source.reshape(heads), x.reshape(heads)
    gelu = partial(jax.nn.gelu, approximate=False)
    made = [
        jnp.einsum("bthf,hfm->bthm", gelu(jnp.einsum("bthk,hkf->bthf", source, inner)), outer)
        for inner, outer in weights
    ]
    hidden = gelu(jnp.einsum("bthm,bthk->bhmk", made[0], x, preferred_element_type=jnp.float32))
    return jnp.einsum("bthm,bhmk->bthk", made[-1], hidden.astype(x.dtype)).reshape(b, t, config.width)
