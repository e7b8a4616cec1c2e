"""MesaNet against its equation in NumPy, with the regression solved directly, over two calls; and its gradient."""

import jax
import jax.numpy as jnp
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
    log_sigmoid,
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
    features = silu(filtered(apply(model.projection, row), wide(model.convolution.weight)))
    q, k = (l2(heads(part, config.heads)) for part in np.split(features, 2, axis=1))
    v = heads(apply(model.value, row), config.heads)
    strength, decay = sigmoid(apply(model.strength, row)), np.exp(log_sigmoid(apply(model.decay, row)))
    penalty = config.least + softplus(wide(model.penalty))
    outputs = np.zeros_like(v)
    for h in range(config.heads):
        size = config.size
        by_key, by_value = np.zeros((size, size)), np.zeros((size, size))
        for t in range(len(row)):
            key = k[t, h]
            by_key = decay[t, h] * by_key + strength[t, h] * np.outer(key, key)
            by_value = decay[t, h] * by_value + strength[t, h] * np.outer(key, v[t, h])
            outputs[t, h] = by_value.T @ np.linalg.solve(by_key + np.diag(penalty[h]), q[t, h])
    y = (rms(outputs, config.epsilon) * wide(model.norm.scale)).reshape(len(row), -1)
    return apply(model.output, y * silu(apply(model.gate, row)) if config.gate else y)


@pytest.mark.parametrize(
    "options", [{"heads": 2, "gate": True}, pytest.param({"heads": 1}, marks=pytest.mark.slow)]
)
def test_equals_the_equation(options):
    model, x = drawn("mesa_net", WIDTH, **options), tokens(TIME, WIDTH)
    got, _ = in_two_calls(model, x)
    np.testing.assert_allclose(got, by_row(lambda row: literal(model, row), x), atol=1e-5)


def test_the_gradient_is_that_of_the_exact_solution():
    """Against differences of the equation in float64 along one direction."""
    model, x = drawn("mesa_net", WIDTH, heads=2), tokens(6, WIDTH, rows=1)
    graph, variables = nnx.split(model)
    weights, along = np.random.default_rng(2).standard_normal((2, *x.shape))

    @jax.jit
    def slope(x):
        _, back = jax.vjp(lambda x: nnx.merge(graph, variables, copy=True)(x)[0], x)
        return jnp.vdot(back(jnp.asarray(weights, jnp.float32))[0], along.astype(np.float32))

    def loss(x):
        return (weights[0] * literal(model, x[0])).sum()

    small, at = 1e-5, np.asarray(x, np.float64)
    want = (loss(at + small * along) - loss(at - small * along)) / (2 * small)
    np.testing.assert_allclose(slope(x), want, rtol=1e-4)
