"""Gated DeltaNet-2 against its equation in NumPy, over two calls."""

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
    low_rank,
    rms,
    sigmoid,
    silu,
    softplus,
    tokens,
    wide,
)

WIDTH, TIME = 8, 12


def literal(model, row):
    config = model.config
    keys, values = config.sizes
    features = silu(filtered(apply(model.projection, row), wide(model.convolution.weight)))
    q, k, v = np.split(features, [config.heads * keys, 2 * config.heads * keys], axis=1)
    q, k, v = l2(heads(q, config.heads)), l2(heads(k, config.heads)), heads(v, config.outputs)
    erase = (2.0 if config.negative_eigenvalues else 1.0) * heads(
        sigmoid(apply(model.erase, row)), config.heads
    )
    write = heads(sigmoid(apply(model.write, row)), config.outputs)
    f = heads(low_rank(model.rate, row), config.heads) + wide(model.decay.bias)
    decay = np.exp(-np.exp(wide(model.decay.log_rate))[:, None] * softplus(f))
    outputs = np.zeros((len(row), config.outputs, values))
    for h in range(config.outputs):
        g = h // (config.outputs // config.heads)
        state = np.zeros((keys, values))
        for t in range(len(row)):
            state = np.diag(decay[t, g]) @ state
            error = write[t, h] * v[t, h] - state.T @ (erase[t, g] * k[t, g])
            state = state + np.outer(k[t, g], error)
            outputs[t, h] = state.T @ q[t, g] / np.sqrt(keys)
    y = (rms(outputs, config.epsilon) * wide(model.norm.scale)).reshape(len(row), -1)
    return apply(model.output, y * sigmoid(low_rank(model.gate, row)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"heads": 1, "value_heads": 2, "key_dim": 4, "value_dim": 3, "negative_eigenvalues": True},
        {"heads": 2},
    ],
)
def test_equals_the_equation(options):
    model, x = drawn("gated_deltanet2", WIDTH, **options), tokens(TIME, WIDTH)
    got, _ = in_two_calls(model, x)
    np.testing.assert_allclose(got, by_row(lambda row: literal(model, row), x), atol=1e-5)
