"""The LSTM against a hand-written cell in NumPy, and its forget gate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.mixers.recurrence.lstm import LSTM, LSTMConfig
from tests.layers.mixers.literal import apply, by_row, sigmoid, wide

WIDTH, TIME = 5, 13


def make(**options):
    return LSTM(LSTMConfig(width=WIDTH, **options), rngs=nnx.Rngs(0))


def literal(model, row):
    h = c = np.zeros(model.config.cells)
    outputs = []
    for x in row:
        i, f, g, o = np.split(apply(model.input, x) + h @ wide(model.recurrent) + wide(model.bias), 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs) if model.output is None else apply(model.output, np.stack(outputs))


@pytest.mark.sample(2)
@pytest.mark.parametrize("options", [{}, {"state_size": 7, "forget_bias": 0.0}])
def test_equals_the_equation(options):
    model = make(**options)
    x = np.random.default_rng(0).standard_normal((2, TIME, WIDTH)).astype(np.float32)
    np.testing.assert_allclose(
        jax.jit(model)(jnp.asarray(x))[0], by_row(lambda row: literal(model, row), x), atol=2e-6
    )


def test_starts_with_an_open_forget_gate_and_an_orthogonal_recurrence():
    model = make()
    np.testing.assert_array_equal(model.bias[...], [0] * 5 + [1] * 5 + [0] * 10)
    recurrent = wide(model.recurrent)
    np.testing.assert_allclose(recurrent @ recurrent.T, np.eye(WIDTH), atol=1e-6)
    assert make(forget_bias=3.0).bias[WIDTH] == 3


def test_cells_with_open_forget_and_closed_input_gates_remember_exactly():
    model = make()
    model.bias[...] = jnp.repeat(jnp.asarray([-200.0, 200.0, 0.0, 0.0]), WIDTH)
    state = model.init_state(2)
    c = jax.random.normal(jax.random.key(0), state.carried.c.shape)
    _, after = model(jnp.ones((2, 50, WIDTH)), state._replace(carried=state.carried._replace(c=c)))
    np.testing.assert_array_equal(after.carried.c, c)


def test_impossible_options_are_refused():
    with pytest.raises(ValueError, match="state_size=0"):
        make(state_size=0)
