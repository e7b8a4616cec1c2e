"""Gated DeltaProduct against its equation in NumPy, over two calls, and what it is with one step per token."""

import numpy as np
import pytest
from flax import nnx

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
    config = model.config
    (keys, values), n = config.sizes, config.householders
    features = silu(filtered(apply(model.projection, row), wide(model.convolution.weight)))
    q, k, v = np.split(features, [config.heads * keys, config.heads * keys * (1 + n)], axis=1)
    q = l2(heads(q, config.heads))
    k = l2(k.reshape(len(row), n, config.heads, keys))
    v = v.reshape(len(row), n, config.outputs, values)
    beta = (2.0 if config.negative_eigenvalues else 1.0) * sigmoid(apply(model.strength, row))
    beta = beta.reshape(len(row), n, config.outputs)
    decay = np.ones((len(row), config.outputs))
    if config.decay:
        rate = np.exp(wide(model.decay.log_rate)) * softplus(apply(model.rate, row) + wide(model.decay.bias))
        decay = np.exp(-rate)
    outputs = np.zeros((len(row), config.outputs, values))
    for h in range(config.outputs):
        g = h // (config.outputs // config.heads)
        state = np.zeros((keys, values))
        for t in range(len(row)):
            state = decay[t, h] * state
            for j in range(n):
                error = v[t, j, h] - state.T @ k[t, j, g]
                state = state + beta[t, j, h] * np.outer(k[t, j, g], error)
            outputs[t, h] = state.T @ q[t, g] / np.sqrt(keys)
    y = (rms(outputs, config.epsilon) * wide(model.norm.scale)).reshape(len(row), -1)
    return apply(model.output, y * silu(apply(model.gate, row)))


@pytest.mark.parametrize(
    "options",
    [
        {"heads": 1, "value_heads": 2, "key_dim": 4, "value_dim": 3},
        pytest.param(
            {"heads": 2, "key_dim": 4, "householders": 3, "decay": False, "negative_eigenvalues": False},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_equals_the_equation(options):
    model, x = drawn("gated_deltaproduct", WIDTH, **options), tokens(TIME, WIDTH)
    got, _ = in_two_calls(model, x)
    np.testing.assert_allclose(got, by_row(lambda row: literal(model, row), x), atol=1e-5)


@pytest.mark.slow
def test_one_step_per_token_is_gated_deltanet():
    options = {"heads": 2, "key_dim": 4, "value_dim": 4, "negative_eigenvalues": True}
    product, gated = (
        drawn("gated_deltaproduct", WIDTH, householders=1, **options),
        drawn("gated_deltanet", WIDTH, **options),
    )
    for name in ("projection", "convolution", "strength"):
        nnx.update(getattr(gated.memory, name), nnx.state(getattr(product, name)))
    for name in ("rate", "decay", "gate", "norm", "output"):
        nnx.update(getattr(gated, name), nnx.state(getattr(product, name)))
    x = tokens(TIME, WIDTH)
    np.testing.assert_allclose(product(x)[0], gated(x)[0], atol=1e-6)
