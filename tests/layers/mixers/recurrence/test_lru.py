"""The LRU against its equation in NumPy, and its initialisation on a ring."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.mixers.recurrence.lru import LRU, LRUConfig

WIDTH, TIME = 5, 19


def complex_of(parameter):
    real, imaginary = np.asarray(parameter[...], np.float64)
    return real + 1j * imaginary


def eigenvalues(model):
    nu, theta = (np.asarray(v[...], np.float64) for v in (model.nu, model.theta))
    return np.exp(-np.exp(nu) + 1j * np.exp(theta))


def literal(model, x):
    """One step at a time in complex128."""
    decay, gamma = eigenvalues(model), np.exp(np.asarray(model.gamma[...], np.float64))
    b, c, d = complex_of(model.b), complex_of(model.c), np.asarray(model.d[...], np.float64)
    outputs = []
    for row in np.asarray(x, np.float64):
        h, y = np.zeros(len(decay), complex), []
        for step in row:
            h = decay * h + gamma * (b @ step)
            y.append((c @ h).real + d * step)
        outputs.append(y)
    return np.stack(outputs)


@pytest.mark.parametrize("options", [{}, {"r_min": 0.9, "r_max": 0.999, "max_phase": 0.3}])
def test_equals_the_equation(options):
    model = LRU(LRUConfig(width=WIDTH, state_size=7, **options), rngs=nnx.Rngs(1))
    x = np.random.default_rng(0).standard_normal((2, TIME, WIDTH)).astype(np.float32)
    np.testing.assert_allclose(model(jnp.asarray(x))[0], literal(model, x), rtol=1e-4, atol=5e-6)


@pytest.mark.slow
def test_eigenvalues_start_uniform_by_area_in_the_ring():
    model = LRU(
        LRUConfig(width=2, state_size=4000, r_min=0.5, r_max=0.9, max_phase=np.pi / 10), rngs=nnx.Rngs(0)
    )
    decay = eigenvalues(model)
    assert np.abs(decay).min() >= 0.5
    assert np.abs(decay).max() <= 0.9
    # Equal areas hold equal counts.
    counts, _ = np.histogram(np.abs(decay) ** 2, bins=8, range=(0.25, 0.81))
    np.testing.assert_allclose(counts / 500, 1, atol=0.2)
    phases, _ = np.histogram(np.angle(decay), bins=8, range=(0, np.pi / 10))
    np.testing.assert_allclose(phases / 500, 1, atol=0.2)


@pytest.mark.slow
def test_states_start_with_the_variance_of_their_inputs():
    model = LRU(LRUConfig(width=64, state_size=32, r_min=0.9, r_max=0.99), rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((8, 500, 64)).astype(np.float32)
    _, state = model(jnp.asarray(x), model.init_state(8))
    assert np.square(np.abs(state.carried)).mean() == pytest.approx(1.0, rel=0.25)
    gamma = np.exp(2 * np.asarray(model.gamma[...], np.float64))
    np.testing.assert_allclose(gamma, 1 - np.abs(eigenvalues(model)) ** 2, rtol=1e-4)


@pytest.mark.slow
def test_no_parameter_makes_it_unstable():
    model = LRU(LRUConfig(width=WIDTH, state_size=4), rngs=nnx.Rngs(0))
    for value in (-30.0, 5.0):
        model.nu[...] = jnp.full_like(model.nu[...], value)
        assert (np.abs(eigenvalues(model)) <= 1).all()
        assert np.isfinite(model(jnp.ones((1, 2000, WIDTH)))[0]).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"state_size": 0}, "state_size=0"),
        ({"r_min": 0.9, "r_max": 0.5}, "r_min=0.9, r_max=0.5"),
        ({"r_max": 1.1}, "r_max=1.1"),
        ({"max_phase": 0.0}, "max_phase=0.0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LRUConfig(width=WIDTH, **options)
