"""DSS: diagonal state spaces whose kernel may be normalized by a softmax over time (Gupta et al. 2022, arXiv:2203.14343)."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from layers import hippo
from layers.kernels.ssm_kernel import ssm_kernel, zoh
from layers.kernels.ssm_kernel.vandermonde import SOFTMAX_EPSILON
from layers.mixer import Mixer
from layers.options import ActivationDtype, checked_dataclass
from layers.parameters import declared, parameter
from layers.parts.segmented_convolution import convolve
from layers.parts.state_space import as_complex, check_steps, complex_normal, log_uniform, run_modes
from layers.segments import Segments
from layers.typing import Array, Complex, Float


@checked_dataclass
class DSSConfig:
    """Options of `DSS`.

    Attributes:
      width: d, number of input and output features, each with its own system; all share the eigenvalues.
      state_size: N, number of complex modes; none stands for a conjugate pair.
      kernel: "softmax" or "exp".
      max_length: L, length over which "softmax" normalizes. Inputs may not be longer; a state continues beyond it.
      dt_min, dt_max: range of the initial step sizes, in units of one token; log-uniform, one per channel.
      dtype: dtype of the activations; kernels and states are float32 and complex64.
    """

    width: int
    state_size: int = 64
    kernel: Literal["softmax", "exp"] = "softmax"
    max_length: int = 1024
    dt_min: float = 0.001
    dt_max: float = 0.1
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        check_steps(self.dt_min, self.dt_max)


class DSS(Mixer):
    """DSS: diagonal state spaces, softmax and exponential kernels (Gupta et al. 2022, arXiv:2203.14343).

        y_t = sum_l K_l x_{t-l} + D x_t
        exp       K_l = Re sum_n W_n (exp(z_n) - 1) / A_n exp(l z_n)
        softmax   K_l = Re sum_n W_n / A_n exp(l z_n) / sum_{m<L} exp(m z_n)

    per channel, with A (N) and W (d x N) complex, D (d) real, z = dt_re Re A + i dt_im Im A; the two step sizes of a
    channel start equal. Without a state it runs as a convolution, with one as the recurrence of its modes. The real parts
    of A are free with "softmax", where a growing mode is normalized by its last term, and negative with "exp". Initially
    A is -1/2 plus the N imaginary parts above zero of HiPPO-LegS of size 2N. The activation and the linear map that the
    paper puts after it are a channel mixer in a joint residual branch.
    """

    def __init__(self, config: DSSConfig, *, rngs: nnx.Rngs):
        self.config = config
        a = hippo.dplr_legs(2 * config.state_size, half=True).eigenvalues
        # log(-Re A) with "exp", Re A with "softmax".
        rate = jnp.log(-a.real) if config.kernel == "exp" else a.real
        self.rate = declared(jnp.asarray(rate, jnp.float32), group="ssm", axes=("state",))
        self.frequency = declared(jnp.asarray(a.imag, jnp.float32), group="ssm", axes=("state",))
        log_dt = log_uniform(config.dt_min, config.dt_max)(rngs.params(), (config.width, 1), jnp.float32)
        self.log_dt = declared(jnp.tile(log_dt, (1, 2)), group="ssm/dt", axes=("embed", None))
        shape = (config.width, config.state_size)
        self.w = complex_normal(rngs, shape, variance=2.0, group="ssm", axes=("embed", "state"))
        normal = nnx.initializers.normal(1.0)
        self.d = parameter(rngs, normal, (config.width,), group="ssm_output", axes=("embed",))

    def initial(self, batch_size: int, max_length: int | None) -> Complex[Array, "b d n"]:
        return jnp.zeros((batch_size, self.config.width, self.config.state_size), jnp.complex64)

    def mix(
        self, x: Float[Array, "b t d"], carried: Complex[Array, "b d n"] | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], Complex[Array, "b d n"] | None]:
        config = self.config
        x = x.astype(config.dtype)
        skip = self.d[...].astype(config.dtype)[None, None] * x
        a, c, dt = self._system()
        if carried is None:
            return convolve(x, self._kernel(a, c, dt, x.shape[1]), segment_ids=segments) + skip, None
        a_bar, b = zoh(a, dt[:, None])
        if config.kernel == "softmax":
            b = _softmax_input(a, dt[:, None], config.max_length)
        y, h = run_modes(a_bar, b, c, x, carried, segment_ids=segments)
        return y.astype(config.dtype) + skip, h

    def _kernel(self, a, c, dt, time):
        longest = self.config.max_length
        options = {"discretization": "zoh", "length": max(1, time)}
        if self.config.kernel == "softmax":
            if time > longest:
                raise ValueError(
                    f"x of DSS has {time} steps, more than max_length={longest}, over which its kernel is normalised; "
                    "set max_length to the longest input"
                )
            options = {"discretization": "softmax", "length": longest}
        return ssm_kernel(a, None, c, dt, conjugate_pairs=False, **options)[:, :time]

    def _system(self):
        """Returns eigenvalues (d, n) in units of the first step size, the matching W, and that step size (d)."""
        rate = -jnp.exp(self.rate[...]) if self.config.kernel == "exp" else self.rate[...]
        common = jax.lax.complex(rate, self.frequency[...])[None]
        dt, ratio = jnp.exp(self.log_dt[:, 0]), jnp.exp(self.log_dt[:, 1] - self.log_dt[:, 0])
        own = jax.lax.complex(jnp.broadcast_to(common.real, self.w.shape[1:]), ratio[:, None] * common.imag)
        size = jnp.maximum(jnp.square(common.real) + jnp.square(common.imag), SOFTMAX_EPSILON)
        return own, as_complex(self.w) * own * common.conj() / size.astype(own.dtype), dt


def _softmax_input(a, dt, length):
    """Returns (exp(z) - 1) / (a (exp(z L) - 1)) with z = dt a; growing modes factor out exp(-z (L - 1))."""
    growing = a.real > 0
    decaying = jnp.where(growing, -a, a)
    step, total = (zoh(decaying, dt * steps)[1] * decaying for steps in (1, length))
    scaled = total * a
    b = step * scaled.conj() / (jnp.abs(scaled) ** 2 + SOFTMAX_EPSILON).astype(step.dtype)
    return b * jnp.where(growing, jnp.exp(decaying * dt.astype(b.dtype) * (length - 1)), 1)
