"""LFM2's block: a short convolution between two gates (Liquid AI 2025, arXiv:2511.23404)."""

import jax.numpy as jnp
from flax import nnx

from layers.mixer import Mixer
from layers.options import ActivationDtype, checked_dataclass
from layers.parameters import linear
from layers.parts.projection import project
from layers.parts.short_convolution import ShortConvolution
from layers.segments import Segments
from layers.typing import Array, Float


@checked_dataclass
class GatedShortConvConfig:
    """Options of `GatedShortConv`.

    Attributes:
      width: d, number of input and output features.
      taps: number of taps of the convolution, 2 to 8.
      bias: whether projections and convolution have biases.
      dtype: dtype of the activations.
    """

    width: int
    taps: int = 3
    bias: bool = False
    dtype: ActivationDtype = jnp.float32


class GatedShortConv(Mixer):
    """The gated short convolution of LFM2 (Liquid AI 2025, arXiv:2511.23404).

        [b, c, u] = W_in x,   y = W_out (c * conv(b * u))

    with a causal filter of `taps` taps per channel and no activation.
    """

    def __init__(self, config: GatedShortConvConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, options = config.width, {"bias": config.bias, "dtype": config.dtype, "rngs": rngs}
        self.input = linear(width, 3 * width, axes=("embed", "inner"), **options)
        self.convolution = ShortConvolution(width, config.taps, activation=None, **options)
        self.output = linear(width, width, axes=("inner", "embed"), **options)

    def initial(self, batch_size: int, max_length: int | None) -> Float[Array, "b memory d"]:
        return self.convolution.init_state(batch_size)

    def mix(
        self, x: Float[Array, "b t d"], carried: Float[Array, "b memory d"] | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b memory d"]]:
        before, after, u = project(self.input, x, (self.config.width,) * 3)
        u, inputs = self.convolution(before * u, carried, segment_ids=segments)
        return self.output(after * u), inputs
