"""Lightweight and dynamic convolution against their equations in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.mixers.convolution.lightweight_conv import DynamicConv, LightweightConv, LightweightConvConfig
from tests.layers.mixers.literal import apply, sigmoid, wide

WIDTH, TIME = 6, 12


def make(mixer, **options):
    return mixer(LightweightConvConfig(width=WIDTH, **{"heads": 2, "taps": 4, **options}), rngs=nnx.Rngs(1))


def inputs(time=TIME):
    return jax.random.normal(jax.random.key(0), (2, time, WIDTH))


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def literal(model, x):
    config, outputs = model.config, []
    for row in np.asarray(x, np.float64):
        value, gate = np.split(apply(model.input, row), 2, axis=1)
        g = value * sigmoid(gate)
        if isinstance(model, DynamicConv):
            weights = softmax(apply(model.weight, g).reshape(len(row), config.heads, config.taps))
        else:
            weights = np.broadcast_to(softmax(wide(model.weight)), (len(row), config.heads, config.taps))
        y = np.zeros_like(g)
        for t in range(len(row)):
            for c in range(WIDTH):
                head = c // (WIDTH // config.heads)
                for j in range(config.taps):
                    s = t - (config.taps - 1) + j
                    y[t, c] += weights[t, head, j] * g[s, c] if s >= 0 else 0.0
        outputs.append(apply(model.output, y))
    return np.stack(outputs)


both = pytest.mark.parametrize("mixer", [LightweightConv, DynamicConv])


@pytest.mark.sample(3)
@both
@pytest.mark.parametrize("options", [{}, {"heads": 6, "taps": 1}, {"heads": 3, "taps": 20}])
def test_equals_the_equation(mixer, options):
    model = make(mixer, **options)
    want = literal(model, inputs())
    np.testing.assert_allclose(model(inputs())[0], want, atol=2e-6)
    np.testing.assert_allclose(model(inputs(), model.init_state(2))[0], want, atol=2e-6)


def test_equal_logits_average_the_window():
    light, dynamic = make(LightweightConv), make(DynamicConv)
    light.weight[...] = jnp.zeros_like(light.weight[...])
    dynamic.weight.kernel[...] = jnp.zeros_like(dynamic.weight.kernel[...])
    for name in ("input", "output"):
        getattr(dynamic, name).kernel[...] = getattr(light, name).kernel[...]
    want = literal(light, inputs())
    np.testing.assert_allclose(dynamic(inputs())[0], want, atol=2e-6)
    x = jnp.ones((1, TIME, WIDTH))
    y = light(x)[0][0]
    # A constant input: a quarter of the final value at the first token, all of it from the fourth on.
    np.testing.assert_allclose(y[3:], jnp.broadcast_to(y[-1:], y[3:].shape), atol=1e-6)
    np.testing.assert_allclose(y[0], y[-1] / 4, atol=1e-6)


def test_initial_windows_have_xaviers_bound():
    model = LightweightConv(LightweightConvConfig(width=64, heads=16, taps=31), rngs=nnx.Rngs(0))
    bound = np.sqrt(6 / (31 + 16 * 31))
    assert 0.98 * bound < np.abs(wide(model.weight)).max() <= bound


@both
@pytest.mark.parametrize(
    "options, message", [({"heads": 4}, "heads=4 does not divide width=6"), ({"taps": 0}, "taps=0")]
)
def test_impossible_options_are_refused(mixer, options, message):
    with pytest.raises(ValueError, match=message):
        make(mixer, **options)
