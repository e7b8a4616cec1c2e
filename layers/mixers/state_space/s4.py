"""S4: a diagonal plus low-rank state space model per channel (Gu et al. 2022, arXiv:2111.00396)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers import hippo
from layers.kernels.ssm_kernel import RealSystem, real_system, restore_output, ssm_kernel, truncate_output
from layers.mixer import SELF, Mixer
from layers.options import ActivationDtype, checked_dataclass
from layers.parameters import parameter
from layers.parts.segmented_convolution import convolve
from layers.parts.state_space import (
    Modes,
    as_complex,
    check_systems,
    complex_normal,
    complex_parameter,
    log_uniform,
    to_channels,
)
from layers.segments import Segments
from layers.typing import Array, Float


@checked_dataclass
class S4Config:
    """Options of `S4`.

    Attributes:
      width: d, number of input and output features, each with its own system.
      state_size: N, number of states per channel; N / 2 conjugate pairs are stored.
      systems: number of different sets of A and B there are; channel i has set i modulo systems. Divides the width; every
        channel has its own C and step size.
      max_length: L. If given, C~ = C (I - a^L) is trained in place of C, as in the paper, and kernels of up to L taps are
        Cauchy sums; longer inputs and states recover C from it. If None, C is trained and kernels are computed from
        powers of a.
      bidirectional: whether a second output vector has a kernel that looks ahead; not causal.
      dt_min, dt_max: range of the initial step sizes, in units of one token; log-uniform, one per channel.
      dtype: dtype of the activations; kernels and states are float32.
    """

    width: int
    state_size: int = 64
    systems: int = 1
    max_length: int | None = None
    bidirectional: bool = False
    dt_min: float = 0.001
    dt_max: float = 0.1
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        check_systems(self)


class S4(Mixer):
    """S4: state space models with a diagonal plus low-rank matrix, HiPPO-LegS (Gu et al. 2022, arXiv:2111.00396).

        y_t = sum_l K_l x_{t-l} + D x_t,    K_l = C a^l b,    A = diag(Lambda) - P P^*
        a = (I - dt/2 A)^{-1} (I + dt/2 A),  b = dt (I - dt/2 A)^{-1} B

    for every channel, with Lambda, P, B, C (N/2) complex, each standing for itself and its conjugate, and dt, D real.
    Without a state it runs as a convolution, with one as the recurrence h_t = a h_{t-1} + b x_t, y_t = C h_t + D x_t. With
    `bidirectional` a second C gives a kernel whose tap l weighs x_{t+1+l}. Initially A and B are HiPPO-LegS in the
    eigenbasis of its normal part. The activation and the linear map that the paper puts after it are a channel mixer,
    such as `half_glu2`, in a joint residual branch.
    """

    patterns = SELF

    def __init__(self, config: S4Config, *, rngs: nnx.Rngs):
        self.config = config
        self.causal = not config.bidirectional
        initial = hippo.dplr_legs(config.state_size, half=True)
        shape = (config.systems, config.state_size // 2)
        self.modes = Modes(initial.eigenvalues, initial.b, config.systems)
        self.p = complex_parameter(np.broadcast_to(initial.p[:, 0], shape), group="ssm", axes=(None, "state"))
        steps = log_uniform(config.dt_min, config.dt_max)
        self.log_dt = parameter(rngs, steps, (config.width,), group="ssm/dt", axes=("embed",))
        outputs = (2 if config.bidirectional else 1, config.width, shape[1])
        self.c = complex_normal(rngs, outputs, group="ssm_output", axes=(None, "embed", "state"))
        if config.max_length is not None:
            a, _, c, dt, p = self._parameters()
            c = truncate_output(a, c, dt, p, length=config.max_length)
            self.c[...] = jnp.stack([c.real, c.imag])
        normal = nnx.initializers.normal(1.0)
        self.d = parameter(rngs, normal, (config.width,), group="ssm_output", axes=("embed",))

    def initial(self, batch_size: int, max_length: int | None) -> Float[Array, "b d n"]:
        return jnp.zeros((batch_size, self.config.width, self.config.state_size), jnp.float32)

    def mix(
        self, x: Float[Array, "b t d"], carried: Float[Array, "b d n"] | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b d n"] | None]:
        config = self.config
        x = x.astype(config.dtype)
        skip = self.d[...].astype(config.dtype)[None, None] * x
        if carried is None:
            kernel = self.kernel(max(1, x.shape[1]))
            ahead = kernel[1] if config.bidirectional else None
            return convolve(x, kernel[0], ahead=ahead, segment_ids=segments) + skip, None
        y, h = _run(self.system(), x.astype(jnp.float32), carried, segments)
        return y.astype(config.dtype) + skip, h

    def kernel(self, length: int) -> Float[Array, "k d l"]:
        """Returns the kernel of each output vector."""
        a, b, c, dt, p = self._parameters()
        options = {"p": p, "discretization": "bilinear"}
        trained = self.config.max_length
        if trained is not None and length <= trained:
            return ssm_kernel(a, b, c, dt, length=trained, truncated=True, **options)[..., :length]
        return ssm_kernel(a, b, self._output(), dt, length=length, **options)

    def system(self) -> RealSystem:
        """Returns the discretized system per channel, in real numbers."""
        a, b, _, dt, p = self._parameters()
        return real_system(a, b, self._output()[0], dt, p)

    def _output(self):
        a, _, c, dt, p = self._parameters()
        trained = self.config.max_length
        return c if trained is None else restore_output(a, c, dt, p, length=trained)

    def _parameters(self):
        width = self.config.width
        p = to_channels(as_complex(self.p), width)[..., None]
        return *self.modes(width), as_complex(self.c), jnp.exp(self.log_dt[...]), p


def _run(system, x, h, segments):
    """Returns y_t = c h_t with h_t = a h_{t-1} + b x_t, token by token."""
    marks = () if segments is None else (segments.real, segments.starts)

    def step(h, inputs):
        x, *marks = inputs
        before = jnp.where(marks[1][:, None, None], 0, h) if marks else h
        h = jnp.einsum("dij,bdj->bdi", system.a_bar, before, precision=jax.lax.Precision.HIGHEST)
        h = h + system.b_bar[None] * x[..., None]
        h = jnp.where(marks[0][:, None, None], h, before) if marks else h
        return h, jnp.einsum("di,bdi->bd", system.c, h, precision=jax.lax.Precision.HIGHEST)

    h, y = jax.lax.scan(step, h, tuple(jnp.swapaxes(v, 0, 1) for v in (x, *marks)))
    return jnp.swapaxes(y, 0, 1), h
