"""RWKV-6 against its equation in NumPy, over two calls, and its initial values."""

import numpy as np

from layers.mixers.linear_attention.rwkv6 import STREAMS, RWKV6Config, _initial_values
from tests.layers.mixers.literal import (
    apply,
    by_row,
    drawn,
    heads,
    in_two_calls,
    layer_norm,
    low_rank,
    silu,
    tokens,
    wide,
)

WIDTH, TIME, SIZE = 8, 12, 4


def literal(model, row):
    before = np.concatenate([np.zeros((1, WIDTH)), row[:-1]])
    dx, mixing = before - row, wide(model.mixing)
    inner = np.tanh((row + mixing[0] * dx) @ wide(model.mix_in)).reshape(len(row), len(STREAMS), -1)
    stream = {
        name: row + (mixing[1 + s] + inner[:, s] @ wide(model.mix_out)[s]) * dx
        for s, name in enumerate(STREAMS)
    }
    count = WIDTH // SIZE
    r, k, v = (
        heads(apply(f, stream[s]), count)
        for f, s in ((model.receptance, "r"), (model.key, "k"), (model.value, "v"))
    )
    decay = heads(np.exp(-np.exp(low_rank(model.decay, stream["w"], np.tanh))), count)
    outputs = np.zeros((len(row), count, SIZE))
    for h in range(count):
        state, bonus = np.zeros((SIZE, SIZE)), np.diag(wide(model.bonus)[h])
        for t in range(len(row)):
            written = np.outer(k[t, h], v[t, h])
            outputs[t, h] = (state + bonus @ written).T @ r[t, h]
            state = np.diag(decay[t, h]) @ state + written
    y = layer_norm(outputs, model.config.epsilon).reshape(len(row), WIDTH)
    y = y * wide(model.norm.scale) + wide(model.norm.bias)
    return apply(model.output, y * silu(apply(model.gate, stream["g"])))


def test_equals_the_equation():
    model, x = drawn("rwkv6", WIDTH, head_dim=SIZE, mix_rank=3, decay_rank=2), tokens(TIME, WIDTH)
    got, _ = in_two_calls(model, x)
    np.testing.assert_allclose(got, by_row(lambda row: literal(model, row), x), atol=1e-5)


def test_deeper_layers_start_with_more_of_the_past_and_slower_decays():
    first, last = (_initial_values(RWKV6Config(64, layer=layer, depth=4)) for layer in (0, 3))
    assert (first["mixing"] >= last["mixing"]).all()
    np.testing.assert_allclose(first["decay"][[0, -1]], [-6, -1])
    assert (last["decay"] <= first["decay"]).all()
    np.testing.assert_allclose(first["bonus"], np.resize([0, 0.1, -0.1], 64))
    np.testing.assert_allclose(last["bonus"][0], 1)
