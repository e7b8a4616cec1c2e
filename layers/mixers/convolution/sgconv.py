"""SGConv: a long convolution whose kernel gets coarser and smaller with the lag (Li et al. 2022, arXiv:2210.09298)."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.parameters import Constant, parameter
from layers.parts.carry import check_inputs, refuse_state
from layers.parts.past_inputs import PastInputs, filter_next, no_inputs, resume
from layers.parts.segmented_convolution import convolve
from layers.segments import SegmentIds
from layers.typing import Array, Float


@dataclasses.dataclass(frozen=True)
class SGConvConfig:
    """Options of `SGConv`.

    Attributes:
      width: d, features in and out, each with a kernel of its own.
      max_length: L, taps of the kernel; what is further back is not seen.
      kernel_size: k, parameters of every scale.
      decay_min, decay_max: factor from one scale to the finer one, evenly spaced over the channels; at least 1.
      bidirectional: a second kernel that looks ahead; not causal.
      dtype: type of activations; kernels are float32.
    """

    width: int
    max_length: int = 1024
    kernel_size: int = 64
    decay_min: float = 2.0
    decay_max: float = 2.0
    bidirectional: bool = False
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.max_length < 1 or self.kernel_size < 1:
            raise ValueError(
                f"max_length={self.max_length}, kernel_size={self.kernel_size}; expected at least 1"
            )
        if not 1 <= self.decay_min <= self.decay_max:
            raise ValueError(
                f"decay_min={self.decay_min}, decay_max={self.decay_max}; expected 1 <= decay_min <= decay_max"
            )

    @property
    def scales(self) -> int:
        """S, so that k 2^(S-1) taps are at least L."""
        return 1 + max(0, math.ceil(math.log2(self.max_length / self.kernel_size)))


class SGConv(nnx.Module):
    """SGConv: structured global convolution, multi-scale decaying kernels (Li et al. 2022, arXiv:2210.09298).

        y_t = sum_{l<L} K_l x_{t-l} + D x_t
        K = [m^(S-1) w_0, m^(S-2) up_1(w_1), m^(S-3) up_2(w_2), m^(S-4) up_4(w_3), ...] / Z

    for every channel, with w_i (k) and up_r stretching r times by linear interpolation, so that the pieces have k, k, 2k, 4k,
    ... taps. w and D start standard normal; Z is the norm that the kernel has then, and stays. With `bidirectional` a second
    kernel weighs x_{t+1+l}. The activation and the linear map that the paper puts behind it are a channel mixer, such as
    `half_glu2`, in a joint residual branch. Its state holds the last L - 1 inputs.
    """

    def __init__(self, config: SGConvConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.causal = not config.bidirectional
        kernels = 2 if config.bidirectional else 1
        normal = nnx.initializers.normal(1.0)
        self.w = parameter(
            rngs, normal, (config.scales, kernels, config.width, config.kernel_size), group="ssm"
        )
        self.d = parameter(rngs, normal, (config.width,), group="ssm_output")
        self.norm = Constant(jnp.linalg.norm(self._pieces(), axis=-1, keepdims=True))

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> PastInputs:
        """No inputs yet.

        Args:
          batch_size: rows.
          max_length: the most tokens that a segment will have, if less than `config.max_length`; outputs of tokens
            beyond are NaN.
        """
        config = self.config
        if not self.causal:
            raise ValueError(
                "a bidirectional SGConv has no state; set bidirectional=False to run it step by step"
            )
        return no_inputs(
            batch_size, filters=1, taps=config.max_length, width=config.width, max_length=max_length
        )

    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: PastInputs | None = None,
        *,
        segment_ids: SegmentIds = None,
    ) -> tuple[Float[Array, "b t d"], PastInputs | None]:
        """Mixes along time; see the contract of mixers in CONTRIBUTING.md."""
        config = self.config
        check_inputs("SGConv", x, config.width, segment_ids)
        if not self.causal:
            refuse_state("SGConv with bidirectional=True", state)
        x = x.astype(config.dtype)
        skip = self.d[...].astype(config.dtype)[None, None] * x
        kernel = self.kernel()
        if state is None:
            ahead = kernel[1] if config.bidirectional else None
            return convolve(x, kernel[0], ahead=ahead, segment_ids=segment_ids) + skip, None
        past, lost = resume(state, config.max_length, segment_ids, x.shape[:2])
        y, inputs = filter_next(x, kernel[0], past.inputs[:, 0], segment_ids)
        y = jnp.where(lost[..., None], jnp.nan, y + skip)
        return y, past._replace(inputs=inputs[:, None])

    def kernel(self) -> Float[Array, "f d l"]:
        """The kernels, one or two."""
        return (self._pieces() / self.norm[...])[..., : self.config.max_length]

    def _pieces(self):
        """All scales one after the other, before they are cut to L and divided by the norm."""
        config = self.config
        decay = jnp.linspace(config.decay_min, config.decay_max, config.width)[None, :, None]
        pieces = []
        for scale in range(config.scales):
            w = self.w[scale] * decay ** (config.scales - 1 - scale)
            length = config.kernel_size << max(0, scale - 1)
            pieces.append(jax.image.resize(w, (*w.shape[:2], length), "linear"))
        return jnp.concatenate(pieces, axis=-1)
