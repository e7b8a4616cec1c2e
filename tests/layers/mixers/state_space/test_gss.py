"""GSS against its equation in NumPy."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from layers.mixers.state_space.gss import GSS, GSSConfig
from tests.layers.mixers.literal import apply, wide

WIDTH, TIME = 8, 15


def make(**options):
    return GSS(GSSConfig(width=WIDTH, **{"state_size": 5, **options}), rngs=nnx.Rngs(1))


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2


def literal(model, x):
    a = -np.exp(wide(model.log_rate)) + 1j * np.exp(wide(model.log_frequency))
    c = wide(model.c)[0] + 1j * wide(model.c)[1]
    outputs = []
    for row in np.asarray(x, np.float64):
        u = gelu(apply(model.value, row))
        u = (u - u.mean(1, keepdims=True)) / np.sqrt(u.var(1, keepdims=True) + 1e-6)
        u = u * wide(model.norm.scale) + wide(model.norm.bias)
        s = wide(model.d) * u
        for t in range(len(u)):
            for lag in range(t + 1):
                s[t] += (c * (np.exp(a) - 1) / a * np.exp(a * lag)).sum(1).real * u[t - lag]
        outputs.append(apply(model.output, apply(model.expand, s) * gelu(apply(model.gate, row))))
    return np.stack(outputs)


@pytest.mark.sample(2)
@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"gate_width": 3, "ssm_width": 6}])
def test_equals_the_equation(options):
    model, x = make(**options), jax.random.normal(jax.random.key(0), (2, TIME, WIDTH))
    want = literal(model, x)
    np.testing.assert_allclose(model(x)[0], want, atol=1e-5 * np.abs(want).max())
    np.testing.assert_allclose(model(x, model.init_state(2))[0], want, atol=1e-5 * np.abs(want).max())


def test_initial_values_and_sizes():
    model = GSS(GSSConfig(width=64), rngs=nnx.Rngs(0))
    assert model.gate.kernel.shape == (64, 256)
    assert model.c.shape == (2, 16, 512)
    for parameter in (model.log_rate, model.log_frequency, model.c[0], model.c[1]):
        assert np.std(np.asarray(parameter)) == pytest.approx(1.0, rel=0.1)


def test_the_output_ignores_the_scale_of_the_inner_signal():
    """The norm before the state space model makes it blind to the size of its input, unlike the gate."""
    model, x = make(ssm_width=6), jax.random.normal(jax.random.key(0), (1, TIME, WIDTH))
    value, gate = model.value.kernel[...], model.gate.kernel[...]
    want = model(x)[0]
    model.value.kernel[...] = 100 * value
    large = model(x)[0]
    model.value.kernel[...] = 200 * value
    np.testing.assert_allclose(model(x)[0], large, rtol=2e-2, atol=2e-2)
    model.value.kernel[...], model.gate.kernel[...] = value, 2 * gate
    assert np.abs(model(x)[0] - want).max() > 0.1


@pytest.mark.parametrize(
    "options, message", [({"state_size": 0}, "state_size=0"), ({"ssm_width": 0}, "ssm_width=0")]
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
    with pytest.raises(ValueError, match="ssm_width=0"):
        GSSConfig(width=3)
