"""SGConv: a long convolution whose kernel gets coarser and smaller with the lag (Li et al. 2022, arXiv:2210.09298)."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from layers.mixer import SELF, Mixer
from layers.options import ActivationDtype, checked_dataclass
from layers.parameters import Constant, parameter
from layers.parts.past_inputs import enter_call, filter_next, no_inputs
from layers.parts.segmented_convolution import convolve
from layers.segments import Segments, Visit
from layers.typing import Array, Float


@checked_dataclass
class SGConvConfig:
    """Options of `SGConv`.

    Attributes:
      width: d, number of input and output features, each with its own kernel.
      max_length: L, number of taps of the kernel; earlier inputs are not seen.
      kernel_size: k, number of parameters per scale.
      decay_min, decay_max: range of the factor between a scale and the next finer one, evenly spaced over the channels;
        at least 1.
      bidirectional: whether a second kernel looks ahead; not causal.
      dtype: dtype of the activations; kernels are float32.
    """

    width: int
    max_length: int = 1024
    kernel_size: int = 64
    decay_min: float = 2.0
    decay_max: float = 2.0
    bidirectional: bool = False
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        if not 1 <= self.decay_min <= self.decay_max:
            raise ValueError(
                f"decay_min={self.decay_min}, decay_max={self.decay_max}; expected 1 <= decay_min <= decay_max"
            )

    @property
    def scales(self) -> int:
        """Number of scales S, such that k 2^(S-1) is at least L."""
        return 1 + max(0, math.ceil(math.log2(self.max_length / self.kernel_size)))


class SGConv(Mixer):
    """SGConv: structured global convolution, multi-scale decaying kernels (Li et al. 2022, arXiv:2210.09298).

        y_t = sum_{l<L} K_l x_{t-l} + D x_t
        K = [m^(S-1) w_0, m^(S-2) up_1(w_1), m^(S-3) up_2(w_2), m^(S-4) up_4(w_3), ...] / Z

    per channel, with w_i (k) and up_r upsampling r times by linear interpolation, so that the pieces have k, k, 2k, 4k,
    ... taps. w and D start standard normal; Z is the norm of the initial kernel and stays fixed. With `bidirectional` a
    second kernel weighs x_{t+1+l}. The activation and the linear map that the paper puts after it are a channel mixer,
    such as `half_glu2`, in a joint residual branch. The state holds the last L - 1 inputs. If `init_state` gets a smaller
    `max_length`, it holds as many inputs as segments of that length need, and outputs of later tokens are NaN.
    """

    patterns = SELF
    keeps_segments = True

    def __init__(self, config: SGConvConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.causal = not config.bidirectional
        shape = (config.scales, 2 if config.bidirectional else 1, config.width, config.kernel_size)
        normal = nnx.initializers.normal(1.0)
        self.w = parameter(rngs, normal, shape, group="ssm", axes=(None, None, "embed", None))
        self.d = parameter(rngs, normal, (config.width,), group="ssm_output", axes=("embed",))
        norm = jnp.linalg.norm(self._pieces(), axis=-1, keepdims=True)
        self.norm = Constant(norm, axes=(None, "embed", None))

    def initial(self, batch_size: int, max_length: int | None) -> Float[Array, "b f s d"]:
        sizes = {"filters": 1, "taps": self.config.max_length, "width": self.config.width}
        return no_inputs(batch_size, **sizes, max_length=max_length)

    def mix(
        self,
        x: Float[Array, "b t d"],
        carried: Float[Array, "b f s d"] | None,
        segments: Segments | None,
        visit: Visit | None,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b f s d"] | None]:
        config = self.config
        x = x.astype(config.dtype)
        skip = self.d[...].astype(config.dtype)[None, None] * x
        kernel = self.kernel()
        if carried is None:
            ahead = kernel[1] if config.bidirectional else None
            return convolve(x, kernel[0], ahead=ahead, segment_ids=segments) + skip, None
        past, lost = enter_call(carried, config.max_length, visit)
        y, inputs = filter_next(x, kernel[0], past[:, 0], segments)
        return jnp.where(lost[..., None], jnp.nan, y + skip), inputs[:, None]

    def kernel(self) -> Float[Array, "f d l"]:
        """Returns the kernels, one or two."""
        return (self._pieces() / self.norm[...])[..., : self.config.max_length]

    def _pieces(self):
        """Returns all scales in order, before the kernel is cut to L and divided by the norm."""
        config = self.config
        decay = jnp.linspace(config.decay_min, config.decay_max, config.width, dtype=jnp.float32)[
            None, :, None
        ]
        pieces = []
        for scale in range(config.scales):
            w = self.w[scale] * decay ** (config.scales - 1 - scale)
            length = config.kernel_size << max(0, scale - 1)
            pieces.append(jax.image.resize(w, (*w.shape[:2], length), "linear"))
        return jnp.concatenate(pieces, axis=-1)
