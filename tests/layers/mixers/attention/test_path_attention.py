"""PaTH attention against its equation in NumPy, transform by transform, over three calls."""

import numpy as np
import pytest

from tests.layers.mixers.literal import (
    apply,
    by_row,
    drawn,
    filtered,
    heads,
    in_calls,
    l2,
    low_rank,
    rms,
    sigmoid,
    silu,
    softmax,
    tokens,
    wide,
)

WIDTH, TIME = 8, 12


def literal(model, row):
    config = model.config
    q, shared = heads(apply(model.query, row), config.heads), config.heads // config.groups
    k, v = (heads(apply(f, row), config.groups) for f in (model.key, model.value))
    if config.qk_norm:
        q = rms(q, config.epsilon) * wide(model.query_norm.scale)
        k = rms(k, config.epsilon) * wide(model.key_norm.scale)
    if config.rank is None:
        w = apply(model.direction, row)
    else:
        w = low_rank(model.direction, row)
    if config.taps is not None:
        w = silu(filtered(w, wide(model.convolution.weight)))
    w, beta = l2(heads(w, config.groups)), 2 * sigmoid(apply(model.strength, row))
    o = np.zeros_like(q)
    for h in range(config.heads):
        g = h // shared
        for i in range(len(row)):
            logits, query = np.zeros(i + 1), q[i, h]
            for j in range(i, -1, -1):
                logits[j] = query @ k[j, g] / np.sqrt(config.size)
                query = query - beta[j, g] * (query @ w[j, g]) * w[j, g]
            o[i, h] = softmax(logits) @ v[: i + 1, g]
    return apply(model.output, o.reshape(len(row), -1))


@pytest.mark.parametrize(
    "options",
    [
        {"heads": 2, "kv_heads": 1, "rank": None, "taps": None, "chunk": 2},
        pytest.param({"heads": 4, "kv_heads": 2, "rank": 3, "qk_norm": True}, marks=pytest.mark.slow),
        pytest.param({"heads": 2, "chunk": 1}, marks=pytest.mark.slow),
    ],
)
def test_equals_the_equation(options):
    model, x = drawn("path_attention", WIDTH, **options), tokens(TIME, WIDTH)
    got, _ = in_calls(model, x, 3)
    np.testing.assert_allclose(got, by_row(lambda row: literal(model, row), x), atol=1e-5)
