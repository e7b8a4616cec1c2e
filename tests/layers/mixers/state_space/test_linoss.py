"""LinOSS against its two schemes step by step in NumPy, with states of two numbers per oscillator, over two calls."""

import jax.numpy as jnp
import numpy as np
import pytest

from layers.mixers.state_space.linoss import implicit, implicit_explicit
from tests.layers.mixers.literal import by_row, drawn, in_two_calls, sigmoid, tokens, wide

WIDTH, TIME, SIZE = 6, 12, 5


def literal(model, row):
    stiffness, dt = np.maximum(wide(model.stiffness), 1e-4), sigmoid(wide(model.dt_logit))
    b, c = wide(model.b)[0] + 1j * wide(model.b)[1], wide(model.c)[0] + 1j * wide(model.c)[1]
    force, outputs = row @ b.T, []
    z, h = np.zeros((2, SIZE), complex)
    for t in range(len(row)):
        if model.config.discretization == "im":
            # z depends on the new h = h + dt z: solves for z.
            z = (z + dt * (force[t] - stiffness * h)) / (1 + dt**2 * stiffness)
        else:
            z = z + dt * (force[t] - stiffness * h)
        h = h + dt * z
        outputs.append((c @ h).real + wide(model.d) * row[t])
    return np.stack(outputs)


@pytest.mark.parametrize("scheme", ["im", pytest.param("imex", marks=pytest.mark.slow)])
def test_equals_the_equation(scheme):
    model, x = drawn("linoss", WIDTH, state_size=SIZE, discretization=scheme), tokens(TIME, WIDTH)
    # Stiffness from the bound to beyond 1.
    model.stiffness[...] = jnp.asarray([-1.0, 0.01, 0.3, 1.0, 3.0], jnp.float32)
    got, _ = in_two_calls(model, x)
    # The softest oscillator is a difference of numbers 100 times as large.
    np.testing.assert_allclose(got, by_row(lambda row: literal(model, row), x), atol=2e-5)


@pytest.mark.slow
def test_eigenvalues_damp_or_conserve():
    stiffness, dt = np.float32([1e-4, 0.5, 2.0, 50.0]), np.float32([0.5, 0.6, 0.9, 0.9])
    damped, _ = implicit(jnp.asarray(stiffness), jnp.asarray(dt))
    np.testing.assert_allclose(np.abs(damped), (1 + dt**2 * stiffness) ** -0.5, rtol=1e-6)
    kept, _ = implicit_explicit(jnp.asarray(stiffness), jnp.asarray(dt))
    np.testing.assert_allclose(np.abs(kept), 1, rtol=1e-5)
