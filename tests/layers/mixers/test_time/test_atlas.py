"""ATLAS's memory against its recurrence in NumPy, token by token, over two calls that end inside chunks."""

import jax.numpy as jnp
import numpy as np
import pytest

from layers.mixers.test_time.atlas import orthogonalized
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

WIDTH, TIME = 6, 14


def newton_schulz(x, steps):
    tall = x.shape[0] > x.shape[1]
    x = (x.T if tall else x) / np.linalg.norm(x)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x.T if tall else x


def polynomial(model, x):
    first, *second = wide(model.coefficients)
    pairs = [second[0] * x[i] * x[j] for i in range(len(x)) for j in range(i, len(x)) if second]
    return np.array([*(first * x), *pairs])


def literal(model, row):
    config = model.config
    features = silu(filtered(apply(model.projection, row), wide(model.convolution.weight)))
    q, k, v = (heads(part, config.heads) for part in np.split(features, 3, axis=1))
    q, k = l2(q), l2(k)
    rates = np.split(sigmoid(apply(model.rates, row) + wide(model.rate_bias)), 4, axis=1)
    momentum, rate, forget, weight = rates
    outputs = np.zeros_like(v)
    for h in range(config.heads):
        memory = surprise = np.zeros((config.features, config.size))
        for t in range(len(row)):
            if t % config.chunk == 0:
                start = memory
            gradient = np.zeros_like(memory)
            for i in range(max(0, t - config.window + 1), t + 1):
                phi = polynomial(model, k[i, h])
                gradient += 2 * weight[i, h] * np.outer(phi, phi @ start - v[i, h])
            surprise = momentum[t, h] * surprise + gradient
            step = config.rate / config.chunk * rate[t, h] * newton_schulz(surprise, config.steps)
            memory = (1 - forget[t, h]) * memory - step
            outputs[t, h] = polynomial(model, q[t, h]) @ memory
    y = (rms(outputs, config.epsilon) * wide(model.norm.scale)).reshape(len(row), -1)
    return apply(model.output, y * silu(apply(model.gate, row)))


@pytest.mark.parametrize(
    "options",
    [
        {"heads": 2, "chunk": 4, "window": 3, "rate": 2.0},
        pytest.param({"heads": 1, "chunk": 1, "window": 1, "degree": 1}, marks=pytest.mark.slow),
        pytest.param({"heads": 1, "chunk": 5, "window": 9, "steps": 2}, marks=pytest.mark.slow),
    ],
)
def test_equals_the_equation(options):
    model, x = drawn("atlas", WIDTH, **options), tokens(TIME, WIDTH)
    got, _ = in_two_calls(model, x)
    np.testing.assert_allclose(got, by_row(lambda row: literal(model, row), x), atol=1e-4)


@pytest.mark.slow
def test_orthogonalized_matrices_keep_their_directions_and_zero_stays_zero():
    x = np.random.default_rng(0).standard_normal((7, 3))
    left, _, right = np.linalg.svd(x, full_matrices=False)
    got = np.asarray(orthogonalized(jnp.asarray(x, jnp.float32), 5))
    turned = left.T @ got @ right.T
    assert (np.abs(np.diag(turned) - 0.95) < 0.35).all()
    np.testing.assert_allclose(turned, np.diag(np.diag(turned)), atol=1e-3)
    assert (orthogonalized(jnp.zeros((3, 2)), 5) == 0).all()
