"""S4D: a diagonal state space model per channel, trained as a convolution (Gu et al. 2022, arXiv:2206.11893)."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers import hippo
from layers.kernels.ssm_kernel import bilinear, ssm_kernel, zoh
from layers.mixer import SELF, Mixer
from layers.options import ActivationDtype, checked_dataclass
from layers.parameters import parameter
from layers.parts.segmented_convolution import convolve
from layers.parts.state_space import Modes, as_complex, check_systems, complex_normal, log_uniform, run_modes
from layers.segments import Segments
from layers.typing import Array, Complex, Float

DISCRETIZATIONS = {"zoh": zoh, "bilinear": bilinear}


@checked_dataclass
class S4DConfig:
    """Options of `S4D`.

    Attributes:
      width: d, number of input and output features, each with its own system.
      state_size: N, number of states per channel; N / 2 conjugate pairs are stored.
      init: initial eigenvalues: "legs", "inv" or "lin".
      systems: number of different sets of eigenvalues and inputs there are; channel i has set i modulo systems. Divides
        the width; every channel has its own C and step size.
      bidirectional: whether a second output vector has a kernel that looks ahead; not causal.
      discretization: "zoh" or "bilinear".
      dt_min, dt_max: range of the initial step sizes, in units of one token; log-uniform, one per channel.
      dtype: dtype of the activations; kernels and states are float32 and complex64.
    """

    width: int
    state_size: int = 64
    init: Literal["legs", "inv", "lin"] = "legs"
    systems: int = 1
    bidirectional: bool = False
    discretization: Literal["zoh", "bilinear"] = "zoh"
    dt_min: float = 0.001
    dt_max: float = 0.1
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        check_systems(self)


class S4D(Mixer):
    """S4D: diagonal state space models with LegS, Inv or Lin eigenvalues (Gu et al. 2022, arXiv:2206.11893).

        y_t = sum_l K_l x_{t-l} + D x_t,    K_l = 2 Re sum_n C_n b_n a_n^l
        a = exp(dt A),  b = (exp(dt A) - 1) / A * B            (zero-order hold; or the bilinear rule)

    for every channel, with A, B, C (N/2) complex and dt, D real. Without a state it runs as a convolution, with one as
    the recurrence h_t = a h_{t-1} + b x_t, y_t = 2 Re(C h_t) + D x_t. With `bidirectional` a second C gives a kernel
    whose tap l weighs x_{t+1+l}. Initially Re A = -1/2, and Im A_n for n < N/2 is

        legs   that of the normal part of HiPPO-LegS, with B its input vector in the eigenbasis (else B = 1)
        inv    N/pi (N / (2n + 1) - 1)
        lin    pi n

    Real parts are trained as logarithms and stay negative. The activation and the linear map that the paper puts after it
    are a channel mixer, such as `half_glu2`, in a joint residual branch.

    Where tokens are not evenly spaced, `segments.intervals` multiplies dt at each token, and the recurrence runs in place of
    the convolution; not with `bidirectional`.

    Args:
      axis: logical axis of the channels; "embed" where they are those of the residual stream.
    """

    patterns = SELF

    def __init__(self, config: S4DConfig, *, axis: str = "embed", rngs: nnx.Rngs):
        self.config = config
        self.causal = self.takes_intervals = not config.bidirectional
        self.modes = Modes(*initial_modes(config.init, config.state_size), config.systems)
        outputs = (2 if config.bidirectional else 1, config.width, config.state_size // 2)
        self.c = complex_normal(rngs, outputs, group="ssm_output", axes=(None, axis, "state"))
        steps, normal = log_uniform(config.dt_min, config.dt_max), nnx.initializers.normal(1.0)
        self.log_dt = parameter(rngs, steps, (config.width,), group="ssm/dt", axes=(axis,))
        self.d = parameter(rngs, normal, (config.width,), group="ssm_output", axes=(axis,))

    def initial(self, batch_size: int, max_length: int | None) -> Complex[Array, "b d n"]:
        return jnp.zeros((batch_size, self.config.width, self.config.state_size // 2), jnp.complex64)

    def mix(
        self, x: Float[Array, "b t d"], carried: Complex[Array, "b d n"] | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], Complex[Array, "b d n"] | None]:
        config = self.config
        x = x.astype(config.dtype)
        skip = self.d[...].astype(config.dtype)[None, None] * x
        (a, b), c, dt = self.modes(config.width), as_complex(self.c), jnp.exp(self.log_dt[...])
        if segments is not None and segments.intervals is not None:
            discretize = DISCRETIZATIONS[config.discretization]

            def at_steps(gaps):
                bar, scale = discretize(a[None, None], dt[None, None, :, None] * gaps[..., None, None])
                return bar, scale * b[None, None]

            h = self.initial(x.shape[0], None) if carried is None else carried
            y, h = run_modes(at_steps, None, 2 * c[0], x, h, segment_ids=segments)
            return y.astype(config.dtype) + skip, h
        if carried is None:
            kernel = ssm_kernel(a, b, c, dt, length=max(1, x.shape[1]), discretization=config.discretization)
            ahead = kernel[1] if config.bidirectional else None
            return convolve(x, kernel[0], ahead=ahead, segment_ids=segments) + skip, None
        a, scale = DISCRETIZATIONS[config.discretization](a, dt[:, None])
        y, h = run_modes(a, scale * b, 2 * c[0], x, carried, segment_ids=segments)
        return y.astype(config.dtype) + skip, h


def initial_modes(init: str, state_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns eigenvalues A and inputs B of N / 2 conjugate pairs."""
    n = np.arange(state_size // 2)
    if init == "legs":
        system = hippo.dplr_legs(state_size, half=True)
        return system.eigenvalues, system.b
    imaginary = np.pi * n if init == "lin" else state_size / np.pi * (state_size / (2 * n + 1) - 1)
    return -0.5 + 1j * imaginary, np.ones(len(n), complex)
