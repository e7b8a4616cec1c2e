"""Discretisation per diagonal mode: h' = a h + b x becomes h_t = a_bar h_{t-1} + (b_scale b) x_t.

`zoh` holds the input constant over a step (exact for such inputs); `bilinear` is the trapezoidal rule. Both keep their
relative accuracy, in value and gradient, as a dt tends to zero.
"""

import jax
import jax.numpy as jnp

from layers.kernels.promotion import joint_dtype, promoting
from layers.typing import Array, Float, Num

# For |z| below this, the power series of (exp(z) - 1) / z is exact to float64 with the terms used here. Above it, the
# quotient and its derivative lose at most a few units in the last place.
SERIES_RADIUS = 0.5
SERIES_TERMS = 14


@promoting
def zoh(
    a: Num[Array, "*#shape"], dt: Float[Array, "*#shape"]
) -> tuple[Num[Array, "*shape"], Num[Array, "*shape"]]:
    """Returns the zero-order hold: a_bar = exp(a dt), b_scale = (exp(a dt) - 1) / a, which is dt where a is 0.

    Args:
      a: eigenvalues of the continuous system, real or complex, per unit of time.
      dt: step size, in that unit of time; broadcasts against a.

    Returns:
      a_bar, b_scale: float32 or wider, complex if a is.
    """
    a, dt = _widen(a, dt)
    z = a * dt
    return jnp.exp(z), _expm1_over(z) * dt


@promoting
def bilinear(
    a: Num[Array, "*#shape"], dt: Float[Array, "*#shape"]
) -> tuple[Num[Array, "*shape"], Num[Array, "*shape"]]:
    """Returns the bilinear (Tustin) rule: a_bar = (1 + a dt/2) / (1 - a dt/2), b_scale = dt / (1 - a dt/2).

    Args:
      a: eigenvalues of the continuous system, real or complex, per unit of time.
      dt: step size, in that unit of time; broadcasts against a.

    Returns:
      a_bar, b_scale: float32 or wider, complex if a is.
    """
    a, dt = _widen(a, dt)
    half = a * (dt / 2)
    inverse = 1 / (1 - half)
    return (1 + half) * inverse, dt * inverse


def _widen(a: jax.Array, dt: jax.Array) -> tuple[jax.Array, jax.Array]:
    return a.astype(joint_dtype(a, jnp.float32)), dt.astype(joint_dtype(dt, jnp.float32))


def _expm1_over(z: jax.Array) -> jax.Array:
    """(exp(z) - 1) / z."""
    small = jnp.abs(jax.lax.stop_gradient(z)) < SERIES_RADIUS
    near, far = jnp.where(small, z, 0), jnp.where(small, 1, z)
    series = jnp.ones_like(z)
    for n in range(SERIES_TERMS, 1, -1):
        series = 1 + near / n * series
    return jnp.where(small, series, _expm1(far) / far)


def _expm1(z: jax.Array) -> jax.Array:
    """exp(z) - 1 from real functions, so that a small real part beside a whole number of turns is not lost."""
    if not jnp.iscomplexobj(z):
        return jnp.expm1(z)
    real = jnp.expm1(z.real) * jnp.cos(z.imag) - 2 * jnp.sin(z.imag / 2) ** 2
    return jax.lax.complex(real, jnp.exp(z.real) * jnp.sin(z.imag))
