"""LinOSS: a state space of forced harmonic oscillators (Rusch and Rus 2024, arXiv:2410.03943)."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from layers.kernels.linear_recurrence import linear_recurrence
from layers.mixer import Mixer
from layers.options import ActivationDtype, checked_dataclass
from layers.parameters import parameter
from layers.segments import Segments
from layers.typing import Array, Complex, Float

# Bounds of the stiffness A, and of dt^2 A where it must be below 4: between them the eigenvalues are a conjugate pair.
SOFTEST, STIFFEST = 1e-4, 3.99


@checked_dataclass
class LinOSSConfig:
    """Options of `LinOSS`.

    Attributes:
      width: d, number of input and output features.
      state_size: P, number of oscillators.
      discretization: "im", implicit and damping, or "imex", which conserves energy.
      dtype: dtype of the activations; the state is complex64.
    """

    width: int
    state_size: int = 64
    discretization: Literal["im", "imex"] = "im"
    dtype: ActivationDtype = jnp.float32


class LinOSS(Mixer):
    """LinOSS: linear oscillators, discretized implicitly or by a symplectic scheme (Rusch and Rus 2024, arXiv:2410.03943).

        h'' = -A h + B x,   y = Re(C h) + D * x,        A >= 0, dt = sigmoid(s): (P); B, C complex; D: (d)
        im:    z_t = z_{t-1} + dt (-A h_t + B x_t),       h_t = h_{t-1} + dt z_t
        imex:  z_t = z_{t-1} + dt (-A h_{t-1} + B x_t),   h_t = h_{t-1} + dt z_t

    Both are a rotation of (z, h) per oscillator, by an eigenvalue of modulus (1 + dt^2 A)^(-1/2) for "im" and 1 for "imex",
    and its conjugate. The recurrence therefore runs on one complex number for real and for imaginary part of B x. This needs
    two different eigenvalues: A is at least 1e-4 and, for "imex", below 4 / dt^2, beyond which that scheme diverges. The
    authors keep only A >= 0. A and s start uniform in [0, 1], and D normal. In the paper a GELU and a gated linear unit
    follow: the channel mixer `half_glu1`.
    """

    def __init__(self, config: LinOSSConfig, *, rngs: nnx.Rngs):
        self.config = config
        size, width = config.state_size, config.width
        unit = nnx.initializers.uniform(1.0)
        self.stiffness = parameter(rngs, unit, (size,), group="ssm", axes=("state",))
        self.dt_logit = parameter(rngs, unit, (size,), group="ssm/dt", axes=("state",))
        inputs, outputs = (2, size, width), (2, width, size)
        self.b = parameter(rngs, _within(width**-0.5), inputs, group="ssm/b", axes=(None, "state", "embed"))
        self.c = parameter(
            rngs, _within(size**-0.5), outputs, group="ssm_output", axes=(None, "embed", "state")
        )
        normal = nnx.initializers.normal(1.0)
        self.d = parameter(rngs, normal, (width,), group="ssm_output", axes=("embed",))

    def initial(self, batch_size: int, max_length: int | None) -> Complex[Array, "b n"]:
        return jnp.zeros((batch_size, 2 * self.config.state_size), jnp.complex64)

    def mix(
        self, x: Float[Array, "b t d"], carried: Complex[Array, "b n"] | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], Complex[Array, "b n"]]:
        config = self.config
        dt = jax.nn.sigmoid(self.dt_logit[...])
        stiffness = jnp.maximum(self.stiffness[...], SOFTEST)
        modes = implicit if config.discretization == "im" else implicit_explicit
        eigenvalue, weight = modes(stiffness, dt)
        x = x.astype(config.dtype)
        # Real parts of all oscillators, then imaginary ones: they do not meet until the output.
        forces = jnp.einsum(
            "btd,cnd->btcn", x, self.b[...].astype(config.dtype), preferred_element_type=jnp.float32
        )
        forces = forces.reshape(*x.shape[:2], 2 * config.state_size)
        real, imaginary = jnp.tile(weight.real, 2), jnp.tile(weight.imag, 2)
        states, last = linear_recurrence(
            jnp.tile(eigenvalue, 2)[None, None],
            jax.lax.complex(forces * real[None, None], forces * imaginary[None, None]),
            initial_state=carried,
            segment_ids=segments,
        )
        real, imaginary = self.c[...]
        weights = jnp.concatenate([real, -imaginary], axis=1).astype(config.dtype)
        y = jnp.einsum("btn,dn->btd", (2 * states.real).astype(config.dtype), weights)
        return y + self.d[...].astype(config.dtype)[None, None] * x, last


def implicit(
    stiffness: Float[Array, " n"], dt: Float[Array, " n"]
) -> tuple[Complex[Array, " n"], Complex[Array, " n"]]:
    """Returns the eigenvalue and the weight of B x in its coordinate p, with h = 2 Re p, of the implicit scheme."""
    root = jnp.sqrt(stiffness)
    shrink = 1 / (1 + dt**2 * stiffness)
    eigenvalue = jax.lax.complex(shrink, shrink * dt * root)
    # The eigenvector is (z, h) = (i root, 1), and one step drives (z, h) by dt shrink (1, dt) B x.
    weight = jax.lax.complex(0.5 * dt**2 * shrink, -0.5 * dt * shrink / root)
    return eigenvalue, weight


def implicit_explicit(
    stiffness: Float[Array, " n"], dt: Float[Array, " n"]
) -> tuple[Complex[Array, " n"], Complex[Array, " n"]]:
    """Returns the same for the scheme that takes h of the step before."""
    squared = jnp.minimum(dt**2 * stiffness, STIFFEST)
    turn = jnp.sqrt(squared * (1 - squared / 4))
    eigenvalue = jax.lax.complex(1 - squared / 2, turn)
    # The eigenvector is ((squared / 2 + i turn) / dt, 1), and one step drives (z, h) by dt (1, dt) B x.
    weight = jax.lax.complex(0.5 * dt**2, 0.5 * dt**2 * (squared / 2 - 1) / turn)
    return eigenvalue, weight


def _within(bound: float):
    """Initializer: uniform between -bound and bound."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
