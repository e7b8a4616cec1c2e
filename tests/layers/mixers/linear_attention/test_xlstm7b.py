"""xLSTM 7B's mLSTM against its equation without stabilization in NumPy, over two calls."""

import numpy as np
from flax import nnx

from layers.mixers.linear_attention.xlstm7b import XLSTM7B, XLSTM7BConfig
from tests.layers.mixers.literal import (
    apply,
    by_row,
    drawn,
    heads,
    in_two_calls,
    layer_norm,
    sigmoid,
    tokens,
    wide,
)

WIDTH, TIME, HEADS, CAP = 8, 12, 2, 2.5


def literal(model, row):
    gates = CAP * np.tanh(apply(model.gates, row) / CAP)
    write, forget = np.exp(gates[:, :HEADS]), sigmoid(gates[:, HEADS:])
    q, k, v = (heads(apply(part, row), HEADS) for part in (model.query, model.key, model.value))
    outputs = np.zeros_like(v)
    for h in range(HEADS):
        memory, normalizer = np.zeros((q.shape[2], v.shape[2])), np.zeros(q.shape[2])
        for t in range(len(row)):
            key = k[t, h] / np.sqrt(q.shape[2])
            memory = forget[t, h] * memory + write[t, h] * np.outer(key, v[t, h])
            normalizer = forget[t, h] * normalizer + write[t, h] * key
            outputs[t, h] = memory.T @ q[t, h] / max(abs(normalizer @ q[t, h]), 1)
    y = layer_norm(outputs, model.config.epsilon).reshape(len(row), -1) * wide(model.norm.scale)
    return apply(model.output, sigmoid(apply(model.gate, row)) * y)


def test_equals_the_equation():
    model = drawn("xlstm7b", WIDTH, heads=HEADS, key_dim=3, gate_cap=CAP)
    model.gates.kernel[...] = 4 * model.gates.kernel[...]
    x = tokens(TIME, WIDTH)
    got, _ = in_two_calls(model, x)
    np.testing.assert_allclose(got, by_row(lambda row: literal(model, row), x), atol=2e-5)


def test_starts_with_gates_that_write_little_and_keep_much():
    model = XLSTM7B(XLSTM7BConfig(width=8, heads=4), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(model.gates.bias[...], [-10] * 4 + [3, 4, 5, 6])
    assert model.config.sizes == (1, 2)
    assert not np.any(model.gates.kernel[...])
