"""HGRN2 against its equation in NumPy, over two calls, and its lower bounds by layer."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.layers.mixers.literal import (
    apply,
    by_row,
    drawn,
    heads,
    in_two_calls,
    rms,
    sigmoid,
    silu,
    tokens,
    wide,
)

WIDTH, TIME, HEADS, KEYS = 8, 12, 2, 3


def literal(model, row):
    bounded = model.bounded is not None and wide(model.bounded) > 0
    bound = sigmoid(wide(model.bound_logit)) if bounded else 0.0
    decay = heads(bound + (1 - bound) * sigmoid(apply(model.forget, row)), HEADS)
    q, v = heads(silu(apply(model.query, row)), HEADS), heads(apply(model.input, row), HEADS)
    outputs = np.zeros((len(row), HEADS, WIDTH // HEADS))
    for h in range(HEADS):
        state = np.zeros((KEYS, WIDTH // HEADS))
        for t in range(len(row)):
            state = np.diag(decay[t, h]) @ state + np.outer(1 - decay[t, h], v[t, h])
            outputs[t, h] = state.T @ q[t, h] / np.sqrt(KEYS)
    return apply(model.output, rms(outputs.reshape(len(row), -1), 1e-5) * wide(model.norm.scale))


@pytest.mark.parametrize(
    "bounded", [1.0, pytest.param(0.0, marks=pytest.mark.slow), pytest.param(None, marks=pytest.mark.slow)]
)
def test_equals_the_equation_with_and_without_a_bound(bounded):
    options = dict(heads=HEADS, key_dim=KEYS, layer=1, depth=2, bounded=bounded is not None)
    model, x = drawn("hgrn2", WIDTH, **options), tokens(TIME, WIDTH)
    if bounded is not None:
        model.bounded[...] = jnp.float32(bounded)
    got, _ = in_two_calls(model, x)
    np.testing.assert_allclose(got, by_row(lambda row: literal(model, row), x), atol=1e-5)
