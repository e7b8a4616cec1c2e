"""S4D: a diagonal state space model in every channel, trained as a convolution (Gu et al. 2022, arXiv:2206.11893)."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers import hippo
from layers.kernels.ssm_kernel import bilinear, ssm_kernel, zoh
from layers.parameters import parameter
from layers.parts.carry import check_inputs, continues, enter, next_segment, refuse_state
from layers.parts.segmented_convolution import convolve
from layers.parts.state_space import (
    Modes,
    as_complex,
    check_systems,
    complex_normal,
    log_uniform,
    run_modes,
)
from layers.segments import SegmentIds
from layers.typing import Array, Complex, Float, Int

DISCRETIZATIONS = {"zoh": zoh, "bilinear": bilinear}
INITS = ("legs", "inv", "lin")


@dataclasses.dataclass(frozen=True)
class S4DConfig:
    """Options of `S4D`.

    Attributes:
      width: d, features in and out, each with a system of its own.
      state_size: N, the true state of a channel; N / 2 conjugate pairs are stored.
      init: eigenvalues at the start: "legs", "inv" or "lin".
      systems: how many different sets of eigenvalues and inputs there are; channel i has set i modulo systems. Divides
        the width; C and the step size always belong to the channel.
      bidirectional: a second output vector whose kernel looks ahead; not causal.
      discretization: "zoh" or "bilinear".
      dt_min, dt_max: range of the initial step sizes, in steps of the sequence; log-uniform, one a channel.
      dtype: type of activations; kernels and states are float32 and complex64.
    """

    width: int
    state_size: int = 64
    init: Literal["legs", "inv", "lin"] = "legs"
    systems: int = 1
    bidirectional: bool = False
    discretization: Literal["zoh", "bilinear"] = "zoh"
    dt_min: float = 0.001
    dt_max: float = 0.1
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.init not in INITS:
            raise ValueError(f"init={self.init!r}; expected one of {INITS}")
        if self.discretization not in DISCRETIZATIONS:
            raise ValueError(
                f"discretization={self.discretization!r}; expected one of {sorted(DISCRETIZATIONS)}"
            )
        check_systems(self)


class S4DState(NamedTuple):
    """The state h of every mode of every channel, and the segment that it belongs to."""

    h: Complex[Array, "b d n"]
    segment: Int[Array, "b"]


class S4D(nnx.Module):
    """S4D: diagonal state space models with LegS, Inv or Lin eigenvalues (Gu et al. 2022, arXiv:2206.11893).

        y_t = sum_l K_l x_{t-l} + D x_t,    K_l = 2 Re sum_n C_n b_n a_n^l
        a = exp(dt A),  b = (exp(dt A) - 1) / A * B            (zero-order hold; or the bilinear rule)

    for every channel, with A, B, C (N/2) complex and dt, D real. Without a state it is a convolution, with one the
    recurrence h_t = a h_{t-1} + b x_t, y_t = 2 Re(C h_t) + D x_t. With `bidirectional` a second C gives a kernel whose tap
    l weighs x_{t+1+l}. Initially Re A = -1/2, and Im A_n for n < N/2 is

        legs   that of the normal part of HiPPO-LegS, with B its input vector in the eigenbasis (else B = 1)
        inv    N/pi (N / (2n + 1) - 1)
        lin    pi n

    Real parts are trained as logarithms and stay negative. The activation and the linear map that the paper puts behind
    it are a channel mixer, such as `half_glu2`, in a joint residual branch.
    """

    def __init__(self, config: S4DConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.causal = not config.bidirectional
        self.modes = Modes(*initial_modes(config.init, config.state_size), config.systems)
        outputs = 2 if config.bidirectional else 1
        self.c = complex_normal(rngs, (outputs, config.width, config.state_size // 2), group="ssm_output")
        self.log_dt = parameter(
            rngs, log_uniform(config.dt_min, config.dt_max), (config.width,), group="ssm/dt"
        )
        self.d = parameter(rngs, nnx.initializers.normal(1.0), (config.width,), group="ssm_output")

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> S4DState:
        """The zero state; its size does not depend on the length."""
        config = self.config
        if not self.causal:
            raise ValueError(
                "a bidirectional S4D has no state; set bidirectional=False to run it step by step"
            )
        h = jnp.zeros((batch_size, config.width, config.state_size // 2), jnp.complex64)
        return S4DState(h, jnp.zeros(batch_size, jnp.int32))

    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: S4DState | None = None,
        *,
        segment_ids: SegmentIds = None,
    ) -> tuple[Float[Array, "b t d"], S4DState | None]:
        """Mixes along time; see the contract of mixers in CONTRIBUTING.md."""
        config = self.config
        check_inputs("S4D", x, config.width, segment_ids)
        if not self.causal:
            refuse_state("S4D with bidirectional=True", state)
        x = x.astype(config.dtype)
        skip = self.d[...].astype(config.dtype)[None, None] * x
        (a, b), c, dt = self.modes(config.width), as_complex(self.c), jnp.exp(self.log_dt[...])
        if state is None:
            kernel = ssm_kernel(a, b, c, dt, length=max(1, x.shape[1]), discretization=config.discretization)
            ahead = kernel[1] if config.bidirectional else None
            return convolve(x, kernel[0], ahead=ahead, segment_ids=segment_ids) + skip, None
        a, scale = DISCRETIZATIONS[config.discretization](a, dt[:, None])
        h = enter(state.h, continues(state.segment, segment_ids))
        y, h = run_modes(a, scale * b, 2 * c[0], x, h, segment_ids=segment_ids)
        return y.astype(config.dtype) + skip, S4DState(
            h, next_segment(state.segment, segment_ids, x.shape[1])
        )


def initial_modes(init: str, state_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues A and inputs B of N / 2 conjugate pairs."""
    n = np.arange(state_size // 2)
    if init == "legs":
        system = hippo.dplr_legs(state_size, half=True)
        return system.eigenvalues, system.b
    imaginary = np.pi * n if init == "lin" else state_size / np.pi * (state_size / (2 * n + 1) - 1)
    return -0.5 + 1j * imaginary, np.ones(len(n), complex)
