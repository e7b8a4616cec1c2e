"""LRU: a complex diagonal linear recurrence that cannot become unstable (Orvieto et al. 2023, arXiv:2303.06349)."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from layers.kernels.linear_recurrence import linear_recurrence
from layers.mixer import Mixer
from layers.options import ActivationDtype, checked_dataclass
from layers.parameters import declared, log_of_uniform, parameter
from layers.segments import Segments
from layers.typing import Array, Complex, Float


@checked_dataclass
class LRUConfig:
    """Options of `LRU`.

    Attributes:
      width: d, number of input and output features.
      state_size: n, number of complex eigenvalues.
      r_min, r_max: radii of the ring in which the eigenvalues start, uniform by area.
      max_phase: upper bound of the initial phases, from 0. Long-range tasks need r_min near 1 and a small angle.
      dtype: dtype of the activations; the state is complex64.
    """

    width: int
    state_size: int = 128
    r_min: float = 0.0
    r_max: float = 1.0
    max_phase: float = 2 * math.pi
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        if not 0 <= self.r_min < self.r_max <= 1:
            raise ValueError(f"r_min={self.r_min}, r_max={self.r_max}; expected 0 <= r_min < r_max <= 1")
        if not 0 < self.max_phase <= 2 * math.pi:
            raise ValueError(f"max_phase={self.max_phase}; expected an angle above 0 and up to 2 pi")


class LRU(Mixer):
    """The linear recurrent unit.

        lambda = exp(-exp(nu) + i exp(theta))
        h_t = lambda * h_{t-1} + exp(gamma) * (B x_t)
        y_t = Re(C h_t) + D * x_t

    with nu, theta, gamma (n), B (n x d) and C (d x n) complex, D (d). |lambda| < 1 for every nu. gamma starts at
    log sqrt(1 - |lambda|^2), which gives every state the variance of its input, and is trained freely. The GELU and
    the gate that the paper puts after it are a channel mixer in a joint residual branch: `full_glu`.
    """

    def __init__(self, config: LRUConfig, *, rngs: nnx.Rngs):
        self.config = config
        modes, width = config.state_size, config.width
        ssm = {"group": "ssm", "axes": ("state",)}
        self.nu = parameter(rngs, _ring(config.r_min, config.r_max), (modes,), **ssm)
        self.theta = parameter(rngs, log_of_uniform(1e-6, config.max_phase), (modes,), **ssm)
        self.gamma = declared(0.5 * jnp.log(-jnp.expm1(-2 * jnp.exp(self.nu[...]))), **ssm)
        normal, into, out = nnx.initializers.normal, (None, "state", "embed"), (None, "embed", "state")
        self.b = parameter(rngs, normal((2 * width) ** -0.5), (2, modes, width), group="ssm/b", axes=into)
        self.c = parameter(rngs, normal(modes**-0.5), (2, width, modes), group="ssm_output", axes=out)
        self.d = parameter(rngs, normal(1.0), (width,), group="ssm_output", axes=("embed",))

    def initial(self, batch_size: int, max_length: int | None) -> Complex[Array, "b n"]:
        return jnp.zeros((batch_size, self.config.state_size), jnp.complex64)

    def mix(
        self, x: Float[Array, "b t d"], carried: Complex[Array, "b n"] | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], Complex[Array, "b n"]]:
        dtype = self.config.dtype
        x = x.astype(dtype)
        b = jnp.exp(self.gamma[...])[None, :, None] * self.b[...]
        inputs = jnp.einsum("btd,cnd->cbtn", x, b.astype(dtype), preferred_element_type=jnp.float32)
        decay = jnp.exp(jax.lax.complex(-jnp.exp(self.nu[...]), jnp.exp(self.theta[...])))
        h, last = linear_recurrence(
            decay[None, None],
            jax.lax.complex(inputs[0], inputs[1]),
            initial_state=carried,
            segment_ids=segments,
        )
        # Computes the real part of C h as one real product.
        features = jnp.concatenate([h.real, h.imag], axis=-1).astype(dtype)
        weights = jnp.concatenate([self.c[0], -self.c[1]], axis=-1).astype(dtype)
        y = jnp.einsum("btn,dn->btd", features, weights) + self.d[...].astype(dtype)[None, None] * x
        return y, last


def _ring(inner: float, outer: float):
    """Initializer of nu: exp(-exp(nu)) has the distribution of radii of points uniform by area in a ring."""

    def init(key, shape, dtype):
        # Excludes the radii 0 and 1, whose nu is infinite.
        area = jax.random.uniform(key, shape, dtype, 1e-6, 1 - 1e-6) * (outer**2 - inner**2) + inner**2
        return jnp.log(-0.5 * jnp.log(area))

    return init
