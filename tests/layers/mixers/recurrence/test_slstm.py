"""sLSTM against its equation without stabilization in NumPy, over two calls, and its initial biases."""

import numpy as np
import pytest
from flax import nnx

from layers.mixers.recurrence.slstm import SLSTM, SLSTMConfig
from tests.layers.mixers.literal import (
    by_row,
    drawn,
    filtered,
    heads,
    in_two_calls,
    layer_norm,
    sigmoid,
    silu,
    tokens,
    wide,
)

WIDTH, TIME, HEADS = 8, 12, 2


def literal(model, row):
    u = silu(filtered(row, wide(model.convolution.weight)) + wide(model.convolution.bias))
    by_gate = [heads(part, HEADS) for part in (u, u, row, row)]
    inputs, recurrent, bias = wide(model.input), wide(model.recurrent), wide(model.bias)
    outputs = np.zeros((len(row), HEADS, WIDTH // HEADS))
    for h in range(HEADS):
        y, c, n = np.zeros((3, WIDTH // HEADS))
        for t in range(len(row)):
            i, f, z, o = (
                part[t, h] @ inputs[g, h] + y @ recurrent[g, h] + bias[g, h] for g, part in enumerate(by_gate)
            )
            c = sigmoid(f) * c + np.exp(i) * np.tanh(z)
            n = sigmoid(f) * n + np.exp(i)
            outputs[t, h] = y = sigmoid(o) * c / n
    return layer_norm(outputs, model.config.epsilon).reshape(len(row), -1) * wide(model.norm.scale)


def test_equals_the_equation():
    model, x = drawn("slstm", WIDTH, heads=HEADS), tokens(TIME, WIDTH)
    got, _ = in_two_calls(model, x)
    np.testing.assert_allclose(got, by_row(lambda row: literal(model, row), x), atol=2e-5)


@pytest.mark.slow
def test_forget_gates_start_open_for_more_cells_in_deeper_layers():
    def bias(layer):
        return wide(SLSTM(SLSTMConfig(32, heads=2, layer=layer, depth=3), rngs=nnx.Rngs(0)).bias)[1]

    first, last = bias(0), bias(2)
    assert first.shape == (2, 16)
    np.testing.assert_allclose(first[0, [0, -1]], [5, -7], atol=1e-6)
    assert (last[:, 1:-1] > first[:, 1:-1]).all()
