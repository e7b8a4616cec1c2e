"""Titans' memory against its recurrence in NumPy, token by token, over two calls that end inside chunks."""

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
    tokens,
    wide,
)

WIDTH, TIME = 8, 20


def literal(model, row):
    config = model.config
    features = silu(filtered(apply(model.projection, row), wide(model.convolution.weight)))
    q, k, v = (heads(part, config.heads) for part in np.split(features, 3, axis=1))
    q, k = l2(q), l2(k)
    momentum, rate, decay = np.split(sigmoid(apply(model.rates, row) + wide(model.rate_bias)), 3, axis=1)
    outputs = np.zeros_like(v)
    for h in range(config.heads):
        memory, surprise = np.zeros((2, config.size, config.size))
        for t in range(len(row)):
            if t % config.chunk == 0:
                start = memory
            gradient = 2 * np.outer(k[t, h], k[t, h] @ start - v[t, h])
            surprise = momentum[t, h] * surprise - config.rate / config.chunk * rate[t, h] * gradient
            memory = (1 - decay[t, h]) * memory + surprise
            outputs[t, h] = q[t, h] @ memory
    y = (rms(outputs, config.epsilon) * wide(model.norm.scale)).reshape(len(row), -1)
    return apply(model.output, y * silu(apply(model.gate, row)))


@pytest.mark.parametrize(
    "options",
    [
        {"heads": 2, "chunk": 4, "rate": 2.0},
        pytest.param({"heads": 1, "chunk": 1}, marks=pytest.mark.slow),
        pytest.param({"heads": 2}, marks=pytest.mark.slow),
    ],
)
def test_equals_the_equation(options):
    model, x = drawn("titans", WIDTH, **options), tokens(TIME, WIDTH)
    got, _ = in_two_calls(model, x)
    np.testing.assert_allclose(got, by_row(lambda row: literal(model, row), x), atol=1e-5)
