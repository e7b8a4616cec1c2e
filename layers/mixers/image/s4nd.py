"""S4ND: state space models over both axes of an image, as global convolutions (Nguyen et al. 2022, arXiv:2210.06583)."""

import math
from functools import partial
from typing import Literal

import jax.numpy as jnp
from flax import nnx

from layers.kernels.ssm_kernel import ssm_kernel
from layers.mixer import Mixer
from layers.mixers.state_space.s4d import initial_modes
from layers.options import ActivationDtype, Positive, checked_dataclass
from layers.parameters import parameter
from layers.parts.images import as_grid, as_tokens, on_images
from layers.parts.segmented_convolution import convolve
from layers.parts.state_space import Modes, as_complex, check_systems, complex_normal, log_uniform
from layers.segments import Segments
from layers.typing import Array, Float


@checked_dataclass
class S4NDConfig:
    """Options of `S4ND`.

    Attributes:
      width: d, number of input and output features, each with its own systems.
      columns: pixels in a row of the image.
      state_size: N, number of states per channel and axis; N / 2 conjugate pairs are stored.
      init: initial eigenvalues: "legs", "inv" or "lin", see `S4D`.
      systems: number of different sets of eigenvalues and inputs per axis; divides the width.
      rank: r, number of products of kernels whose mean is the kernel of the image.
      bidirectional: whether kernels look both ways along each axis; otherwise a pixel sees what is above and left of it.
      bandlimit: modes that turn faster than this fraction of the fastest rate that pixels can show do not count; None for no limit.
      rate: size of a pixel in units of those of training: 0.5 for images of twice the resolution.
      discretization: "zoh" or "bilinear".
      dt_min, dt_max: range of the initial step sizes, in units of one pixel; log-uniform, one per channel and axis.
      dtype: dtype of the activations; kernels are float32.
    """

    width: int
    columns: int = 32
    state_size: int = 64
    init: Literal["legs", "inv", "lin"] = "legs"
    systems: int = 1
    rank: int = 1
    bidirectional: bool = True
    bandlimit: Positive | None = None
    rate: Positive = 1.0
    discretization: Literal["zoh", "bilinear"] = "zoh"
    dt_min: float = 0.1
    dt_max: float = 1.0
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        check_systems(self)


class S4ND(Mixer):
    """S4ND: diagonal state spaces over both axes of an image, as global convolutions (Nguyen et al. 2022, arXiv:2210.06583).

        y_ij = 1/r sum_s sum_kl K^s_k L^s_l x_(i-k)(j-l) + D x_ij

    for every channel, with kernels K^s along columns and L^s along rows, each that of a state space of its axis,

        K_k = 2 Re sum_n C_n b_n a_n^k for k >= 0,   and with a second C at k = -1, -2, ... the taps -k - 1

    (see `S4D`). A product of kernels is two convolutions, one after the other. With `bandlimit` alpha, C_n is zero where
    dt |Im A_n| / (2 pi) >= alpha / 2, which keeps a model that is read at another resolution, with `rate`, from aliasing. Step
    sizes suit images some tens of pixels wide. The tokens of a segment are the pixels of an image in rows of `columns`, of
    which the last may be shorter; packed images cost one pass per segment of the fullest row. Not causal. The activation and
    the linear map that the paper puts after it are a channel mixer, such as `half_glu2`.
    """

    patterns = ("noncausal_self",)
    causal = False

    def __init__(self, config: S4NDConfig, *, rngs: nnx.Rngs):
        self.config = config
        modes = initial_modes(config.init, config.state_size)
        # Of the rows' axis, and of the columns'.
        self.modes = nnx.List(Modes(*modes, config.systems) for _ in range(2))
        outputs = (2, 1 + config.bidirectional, config.rank, config.width, config.state_size // 2)
        axes = (None, None, None, "embed", "state")
        self.c = complex_normal(rngs, outputs, group="ssm_output", axes=axes)
        steps, normal = log_uniform(config.dt_min, config.dt_max), nnx.initializers.normal(1.0)
        self.log_dt = parameter(rngs, steps, (2, config.width), group="ssm/dt", axes=(None, "embed"))
        self.d = parameter(rngs, normal, (config.width,), group="ssm_output", axes=("embed",))

    def mix(
        self, x: Float[Array, "b t d"], carried: None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], None]:
        config, x = self.config, x.astype(self.config.dtype)
        rows = -(-x.shape[1] // config.columns)
        kernels = [self.kernels(0, max(1, rows)), self.kernels(1, config.columns)]
        y = on_images(partial(_convolved, config.columns), kernels, x, segments)
        return y + self.d[...].astype(config.dtype)[None, None] * x, None

    def kernels(self, axis: int, length: int) -> Float[Array, "way r d l"]:
        """Returns the kernels along an axis, those that look back and, if there are any, those that look ahead."""
        config, c, dt = self.config, as_complex(self.c)[axis], jnp.exp(self.log_dt[axis])
        a, b = self.modes[axis](config.width)
        if config.bandlimit is not None:
            turns = dt[:, None] * jnp.abs(a.imag) / (2 * math.pi)
            c = jnp.where((turns < 0.5 * config.bandlimit)[None, None], c, 0)
        return ssm_kernel(a, b, c, config.rate * dt, length=length, discretization=config.discretization)


def _convolved(columns, kernels, x, _):
    """The mean over the products of kernels of x convolved along both axes."""
    grid, total = as_grid(x, columns), 0
    b, rows, _, width = grid.shape
    for number in range(kernels[0].shape[1]):
        down = jnp.tile(kernels[0][:, number], (1, columns, 1))  # of every column
        across = _convolve(grid.reshape(b * rows, columns, width), kernels[1][:, number])
        total += _convolve(across.reshape(b, rows, columns * width), down)
    mean = (total / kernels[0].shape[1]).reshape(grid.shape)
    return as_tokens(mean, x.shape[1]).astype(x.dtype)


def _convolve(lines, kernel):
    """Convolves (b, t, d) along t by the taps that look back and, if there are any, those that look ahead."""
    return convolve(lines, kernel[0], ahead=kernel[1] if len(kernel) == 2 else None)
