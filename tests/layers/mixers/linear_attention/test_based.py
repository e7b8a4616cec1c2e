"""Based against attention with the weights 1 + z + z^2 / 2, over two calls and over the whole sequence."""

import numpy as np
import pytest

from tests.layers.mixers.literal import apply, by_row, drawn, heads, in_two_calls, tokens

WIDTH, TIME, HEADS, KEYS = 8, 12, 2, 3


def literal(model, row, causal):
    q, k, v = (heads(apply(f, row), HEADS) for f in (model.query, model.key, model.value))
    outputs = np.zeros_like(v)
    for h in range(HEADS):
        z = q[:, h] @ k[:, h].T / np.sqrt(KEYS)
        weights = 1 + z + z * z / 2
        if causal:
            weights = np.tril(weights)
        outputs[:, h] = weights @ v[:, h] / weights.sum(1, keepdims=True)
    return apply(model.output, outputs.reshape(len(row), -1))


def test_equals_the_equation():
    model, x = drawn("based", WIDTH, heads=HEADS, feature_dim=KEYS), tokens(TIME, WIDTH)
    got, _ = in_two_calls(model, x)
    np.testing.assert_allclose(got, by_row(lambda row: literal(model, row, True), x), atol=1e-5)


@pytest.mark.slow
def test_without_causality_all_tokens_are_seen():
    model, x = drawn("based", WIDTH, heads=HEADS, feature_dim=KEYS, causal=False), tokens(TIME, WIDTH)
    np.testing.assert_allclose(model(x)[0], by_row(lambda row: literal(model, row, False), x), atol=1e-5)
