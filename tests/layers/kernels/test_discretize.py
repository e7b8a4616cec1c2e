"""Zero-order hold and the bilinear rule: accuracy of values and derivatives over all sizes of a dt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.kernels.ssm_kernel import bilinear, zoh


def expm1_over(z):
    """(exp(z) - 1) / z and its derivative in complex128."""
    near = np.where(np.abs(z) < 0.5, z, 0)
    far = np.where(np.abs(z) < 0.5, 1, z)
    value, slope, term = np.ones_like(z), np.zeros_like(z), np.ones_like(z)
    for n in range(2, 25):
        slope = slope + (n - 1) * term / n
        term = term * near / n
        value = value + term
    quotient = (np.exp(far) - 1) / far
    return np.where(far == z, quotient, value), np.where(far == z, (np.exp(far) - quotient) / far, slope)


@pytest.mark.parametrize("imaginary", [False, True])
def test_zoh_is_accurate_at_every_size_in_value_and_gradient(imaginary):
    rng = np.random.default_rng(0)
    size = -(10.0 ** rng.uniform(-9, 1, 500))
    a = (size * (np.exp(1j * rng.uniform(-1.5, 1.5, 500)) if imaginary else 1)).astype(np.complex64)
    a, dt = (a if imaginary else a.real), np.float32(0.3)
    want, slope = expm1_over(a.astype(complex) * float(dt))

    def b_scale(a):
        return zoh(a, jnp.asarray(dt))[1]

    got = np.asarray(b_scale(jnp.asarray(a)))
    np.testing.assert_array_less(np.abs(got - dt * want), 1e-6 * np.abs(dt * want))
    gradient = np.asarray(jax.vmap(jax.grad(b_scale, holomorphic=imaginary))(jnp.asarray(a)))
    np.testing.assert_array_less(np.abs(gradient - dt**2 * slope), 3e-6 * np.abs(dt**2 * slope))


def test_zoh_at_zero_and_at_whole_turns():
    a_bar, b_scale = zoh(jnp.zeros(2, jnp.complex64), jnp.array([0.1, 0.2]))
    np.testing.assert_array_equal(a_bar, [1, 1])
    np.testing.assert_array_equal(b_scale, np.array([0.1, 0.2], np.float32))
    slope = jax.grad(lambda a: zoh(a, jnp.float32(0.1))[1])(jnp.float32(0))
    np.testing.assert_allclose(slope, 0.1**2 / 2, rtol=1e-6)
    # exp(a) - 1 is about -1e-4 here, which the difference of exp(a) and 1 would hold to three digits.
    a = np.complex64(-1e-4 + 2j * np.pi)
    want = (np.exp(complex(a)) - 1) / complex(a)
    np.testing.assert_allclose(zoh(jnp.asarray(a), jnp.float32(1))[1], want, rtol=1e-5)


def test_bilinear_rule():
    a = jnp.array([-1 + 2j, -3.0, 0, -20j], jnp.complex64)
    a_bar, b_scale = bilinear(a, jnp.float32(0.5))
    z = np.asarray(a, complex) / 4
    np.testing.assert_allclose(a_bar, (1 + z) / (1 - z), rtol=1e-6)
    np.testing.assert_allclose(b_scale, 0.5 / (1 - z), rtol=1e-6)


@pytest.mark.parametrize("rule", [zoh, bilinear])
def test_results_are_float32_or_wider(rule):
    for dtype, want in (
        (jnp.bfloat16, jnp.float32),
        (jnp.float32, jnp.float32),
        (jnp.complex64, jnp.complex64),
    ):
        assert all(v.dtype == want for v in rule(jnp.full(2, -0.5, dtype), jnp.full(2, 0.1, jnp.bfloat16)))
