"""Forgetting attention against its equation in NumPy, over two calls, and what its gates do."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.layers.mixers.literal import (
    apply,
    by_row,
    drawn,
    heads,
    in_two_calls,
    log_sigmoid,
    rms,
    sigmoid,
    softmax,
    tokens,
    wide,
)

WIDTH, TIME = 8, 12


def literal(model, row):
    config = model.config
    q = heads(apply(model.query, row), config.heads)
    k, v = (heads(apply(f, row), config.groups) for f in (model.key, model.value))
    if config.qk_norm:
        q = rms(q, config.epsilon) * wide(model.query_norm.scale).reshape(-1, config.size)
        k = rms(k, config.epsilon) * wide(model.key_norm.scale).reshape(-1, config.size)
    log_forget = log_sigmoid(apply(model.forget, row))
    outputs = np.zeros_like(q)
    for h in range(config.heads):
        g = h // (config.heads // config.groups)
        for t in range(len(row)):
            decay = np.asarray([log_forget[j + 1 : t + 1, h].sum() for j in range(t + 1)])
            logits = k[: t + 1, g] @ q[t, h] / np.sqrt(config.size) + decay
            outputs[t, h] = softmax(logits) @ v[: t + 1, g]
    y = outputs.reshape(len(row), -1)
    return apply(model.output, y if model.gate is None else y * sigmoid(apply(model.gate, row)))


@pytest.mark.parametrize(
    "options",
    [
        {"heads": 4, "kv_heads": 2, "qk_norm": True, "gate": True},
        pytest.param(
            {"heads": 4, "kv_heads": 2, "qk_norm": True, "norm_scales": "own"}, marks=pytest.mark.slow
        ),
        pytest.param({"heads": 2}, marks=pytest.mark.slow),
    ],
)
def test_equals_the_equation(options):
    model, x = drawn("forgetting_attention", WIDTH, **options), tokens(TIME, WIDTH)
    got, state = in_two_calls(model, x)
    np.testing.assert_allclose(got, by_row(lambda row: literal(model, row), x), atol=1e-5)
    totals = by_row(lambda row: log_sigmoid(apply(model.forget, row)).sum(0), x)
    np.testing.assert_allclose(state.carried.total, totals, rtol=1e-5)


@pytest.mark.slow
def test_a_gate_that_is_shut_hides_the_past():
    model, x = drawn("forgetting_attention", WIDTH, heads=2), tokens(TIME, WIDTH)
    model.forget.kernel[...] = jnp.zeros((WIDTH, 2))
    model.forget.bias[...] = jnp.full(2, -60.0)
    got, _ = model(x)
    want = by_row(lambda row: apply(model.output, apply(model.value, row)), x)
    np.testing.assert_allclose(got, want, atol=1e-5)
