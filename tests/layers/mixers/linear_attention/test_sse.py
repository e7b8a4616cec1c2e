"""Sparse state expansion against its equation in NumPy, over two calls, and the loss of its router."""

import jax
import jax.numpy as jnp
import numpy as np

from layers.adapters import dropping
from layers.segments import Segments
from tests.layers.mixers.literal import (
    apply,
    drawn,
    heads,
    in_two_calls,
    low_rank,
    rms,
    sigmoid,
    silu,
    softmax,
    tokens,
    wide,
)

WIDTH, TIME, PARTITIONS = 8, 12, 4
OPTIONS = {"heads": 2, "key_dim": 3, "partitions": PARTITIONS, "top_k": 2, "gate_rank": 3, "temperature": 2.0}


def literal(model, row):
    config, (key_dim, value_dim) = model.config, model.config.sizes
    q, k = apply(model.query, row), apply(model.key, row)
    # The pair of the shared partition, and that of all others.
    queries = [silu(heads(part, 2)) for part in (q, q + low_rank(model.query_change, row))]
    keys = [heads(part, 2) for part in (k, k + low_rank(model.key_change, row))]
    decays = [
        heads(sigmoid(low_rank(gate, row)) ** (1 / config.temperature), 2)
        for gate in (model.shared_decay, model.decay)
    ]
    v = silu(heads(apply(model.value, row), 2))
    outputs = np.zeros((len(row), 2, value_dim))
    states = np.zeros((2, 1 + PARTITIONS, key_dim, value_dim))
    for t in range(len(row)):
        share = softmax(apply(model.router, row[t]))
        amounts = np.where(share >= np.sort(share)[-config.top_k], share, 0)
        for h in range(2):
            for i, amount in enumerate((1.0, *amounts)):
                kind = min(i, 1)
                if amount:
                    written = amount * np.outer(softmax(keys[kind][t, h]), v[t, h])
                    states[h, i] = np.diag(decays[kind][t, h]) @ states[h, i] + written
                outputs[t, h] += states[h, i].T @ (amount * queries[kind][t, h]) / np.sqrt(key_dim)
    y = (rms(outputs, config.epsilon) * wide(model.norm.scale)).reshape(len(row), -1)
    return apply(model.output, y * silu(low_rank(model.gate, row))), states


def test_equals_the_equation():
    model, x = drawn("sse", WIDTH, **OPTIONS), tokens(TIME, WIDTH)
    got, state = in_two_calls(model, x)
    expected, states = zip(*(literal(model, row) for row in np.asarray(x, np.float64)), strict=True)
    np.testing.assert_allclose(got, np.stack(expected), atol=5e-6)
    np.testing.assert_allclose(state.carried, np.stack(states).reshape(state.carried.shape), atol=5e-6)


def test_the_loss_of_the_router_is_of_real_tokens_in_training():
    model, x = drawn("sse", WIDTH, **OPTIONS), tokens(TIME, WIDTH)
    model.auxiliary[...] = jnp.zeros(())
    ids = np.ones((2, TIME), np.int32)
    ids[0, 5:] = 0
    segments = Segments.of(jnp.asarray(ids))
    model._route(x, segments)
    assert model.auxiliary[...] == 0
    with dropping(jax.random.key(0)):
        model._route(x, segments)
    real = np.asarray(x, np.float64)[ids == 1]
    shares = np.stack([softmax(apply(model.router, token)) for token in real])
    load = (shares >= np.sort(shares)[:, -2:-1]).mean(0)
    expected = 0.01 * PARTITIONS / 2 * (shares.mean(0) * load).sum()
    np.testing.assert_allclose(model.auxiliary[...], expected, rtol=1e-5)
