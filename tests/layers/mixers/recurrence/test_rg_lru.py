"""Griffin's recurrent block against its equation in NumPy, its initialisation, and its bounded gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.mixers.recurrence.rg_lru import RGLRU, RGLRUConfig, bounded_sqrt
from tests.layers.mixers.literal import apply, sigmoid, wide

WIDTH, TIME = 6, 17


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def literal(model, x):
    """Head by head and step by step in float64."""
    config, outputs = model.config, []
    size = config.channels // config.heads
    rate = 8 * np.log1p(np.exp(wide(model.decay)))
    taps, bias = wide(model.convolution.weight), wide(model.convolution.bias)
    for row in np.asarray(x, np.float64):
        inputs = apply(model.input, row)
        padded = np.concatenate([np.zeros((len(taps) - 1, config.channels)), inputs])
        h, states = np.zeros(config.channels), []
        for t in range(len(row)):
            u = (taps * padded[t : t + len(taps)]).sum(0) + bias
            gates = np.zeros((2, config.channels))
            for gate in range(2):
                for head in range(config.heads):
                    mine = slice(head * size, (head + 1) * size)
                    logits = u[mine] @ wide(model.gates)[gate, head] + wide(model.gate_biases)[gate, head]
                    gates[gate, mine] = sigmoid(logits)
            a = np.exp(-rate * gates[0])
            weight = 1.0 if t == 0 else np.sqrt(1 - a**2)
            h = a * h + weight * gates[1] * u
            states.append(h)
        branch = gelu(apply(model.gate, row))
        outputs.append(apply(model.output, np.stack(states) * branch))
    return np.stack(outputs)


@pytest.mark.parametrize("options", [{"heads": 2}, {"heads": 1, "state_size": 9, "taps": 2}])
def test_equals_the_equation(options):
    model = RGLRU(RGLRUConfig(width=WIDTH, **options), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for variable in (model.convolution.weight, model.convolution.bias, model.gate_biases, model.decay):
        variable[...] = jnp.asarray(rng.standard_normal(variable.shape), jnp.float32)
    x = rng.standard_normal((2, TIME, WIDTH)).astype(np.float32)
    np.testing.assert_allclose(jax.jit(model)(jnp.asarray(x))[0], literal(model, x), rtol=1e-4, atol=5e-6)


def test_initial_decays_gates_and_taps_are_those_of_the_authors():
    model = RGLRU(RGLRUConfig(width=512, heads=4, depth=8), rngs=nnx.Rngs(0))
    base = np.exp(-np.log1p(np.exp(wide(model.decay))))
    assert base.min() >= 0.8999
    assert base.max() <= 0.9991
    # Uniform by area: squares are uniform.
    assert (base**2).mean() == pytest.approx((0.9**2 + 0.999**2) / 2, abs=0.005)
    assert wide(model.gates).var() == pytest.approx(1 / 512, rel=0.05)
    assert wide(model.convolution.weight).var() == pytest.approx(0.01 / 4, rel=0.1)
    assert wide(model.output.kernel).var() == pytest.approx(2 / (8 * 512), rel=0.05)


def test_a_closed_recurrence_gate_keeps_the_state_exactly():
    model = RGLRU(RGLRUConfig(width=WIDTH, heads=1), rngs=nnx.Rngs(0))
    state = model.init_state(2)
    _, state = model(jnp.ones((2, 3, WIDTH)), state)
    model.gate_biases[...] = model.gate_biases[...].at[0].set(-1e4)
    _, after = model(jnp.ones((2, TIME, WIDTH)), state)
    np.testing.assert_array_equal(after.carried.h, state.carried.h)


def test_the_root_is_exact_and_its_derivative_bounded():
    x = jnp.asarray([0.0, 1e-12, 1e-6, 0.25, 1.0])
    np.testing.assert_array_equal(bounded_sqrt(x), jnp.sqrt(x))
    slope = jax.vmap(jax.grad(bounded_sqrt))(x)
    np.testing.assert_allclose(slope, [1000, 1000, 500, 1, 0.5], rtol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"heads": 4}, "heads=4 does not divide the 6 channels"),
        ({"state_size": 0}, "state_size=0"),
        ({"heads": 1, "r_max": 1.0}, "r_max=1.0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RGLRUConfig(width=WIDTH, **options)
