"""Comba against its equation in NumPy, over two calls."""

import numpy as np
import pytest

from tests.layers.mixers.literal import (
    apply,
    by_row,
    drawn,
    filtered,
    heads,
    in_two_calls,
    l2,
    rms,
    sigmoid,
    silu,
    softplus,
    tokens,
    wide,
)

WIDTH, TIME = 8, 12


def literal(model, row):
    config, memory = model.config, model.memory
    keys, values = config.sizes
    features = silu(filtered(apply(memory.projection, row), wide(memory.convolution.weight)))
    q, k, v = np.split(features, [config.heads * keys, 2 * config.heads * keys], axis=1)
    q, k, v = heads(q, config.heads), heads(k, config.heads), heads(v, config.outputs)
    feedback = sigmoid(wide(model.feedback))[:, None]
    q = l2(q - wide(model.correction)[:, None] * feedback * k)
    k = l2(k)
    erased = feedback * k if config.weaker_feedback else k
    beta = sigmoid(apply(memory.strength, row))
    rate = np.exp(wide(model.decay.log_rate)) * softplus(apply(model.rate, row) + wide(model.decay.bias))
    outputs = np.zeros((len(row), config.outputs, values))
    for h in range(config.outputs):
        g = h // (config.outputs // config.heads)
        state = np.zeros((keys, values))
        for t in range(len(row)):
            state = np.exp(-rate[t, h]) * state
            error = v[t, h] - state.T @ erased[t, g]
            state = state + beta[t, h] * np.outer(k[t, g], error)
            outputs[t, h] = state.T @ q[t, g] / np.sqrt(keys)
    y = (rms(outputs, config.epsilon) * wide(model.norm.scale)).reshape(len(row), -1)
    return apply(model.output, y * sigmoid(apply(model.gate, row)))


@pytest.mark.parametrize(
    "options",
    [
        {"heads": 1, "value_heads": 2, "key_dim": 4, "value_dim": 3, "weaker_feedback": True},
        pytest.param({"heads": 2, "key_dim": 4, "value_dim": 4}, marks=pytest.mark.slow),
    ],
)
def test_equals_the_equation(options):
    model, x = drawn("comba", WIDTH, **options), tokens(TIME, WIDTH)
    got, _ = in_two_calls(model, x)
    np.testing.assert_allclose(got, by_row(lambda row: literal(model, row), x), atol=1e-5)
