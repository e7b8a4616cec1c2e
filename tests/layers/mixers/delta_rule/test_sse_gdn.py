"""Sparse state expansion on the gated delta rule against its equation in NumPy, over two calls and in training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.layers.mixers.literal import (
    apply,
    drawn,
    heads,
    in_two_calls,
    l2,
    low_rank,
    rms,
    sigmoid,
    silu,
    softmax,
    softplus,
    tokens,
    wide,
)

WIDTH, TIME, PARTITIONS = 8, 12, 4
OPTIONS = {"heads": 2, "key_dim": 3, "partitions": PARTITIONS, "top_k": 2}


def literal(model, row):
    config, (key_dim, value_dim) = model.config, model.config.sizes
    q, k = apply(model.query, row), apply(model.key, row)
    # What belongs to the shared partition, and what to all others.
    queries = [l2(silu(heads(part, 2))) for part in (q, q + low_rank(model.query_change, row))]
    keys = [l2(silu(heads(part, 2))) for part in (k, k + low_rank(model.key_change, row))]
    largest = 2 if config.negative_eigenvalues else 1
    betas = [largest * sigmoid(apply(m, row)) for m in (model.shared_strength, model.strength)]
    decays = [
        np.exp(-np.exp(wide(decay.log_rate)) * softplus(apply(rate, row) + wide(decay.bias)))
        for rate, decay in ((model.shared_rate, model.shared_decay), (model.rate, model.decay))
    ]
    v = silu(heads(apply(model.value, row), 2))
    outputs = np.zeros((len(row), 2, value_dim))
    states = np.zeros((2, 1 + PARTITIONS, key_dim, value_dim))
    for t in range(len(row)):
        share = softmax(apply(model.router, row[t]))
        amounts = np.where(share >= np.sort(share)[-config.top_k], share, 0)
        for h in range(2):
            for i, amount in enumerate((1.0, *amounts)):
                if amount:
                    kind = min(i, 1)
                    key, state = keys[kind][t, h], decays[kind][t, h] * states[h, i]
                    error = v[t, h] - state.T @ key
                    states[h, i] = state + amount * betas[kind][t, h] * np.outer(key, error)
                    outputs[t, h] += amount * states[h, i].T @ queries[kind][t, h] / np.sqrt(key_dim)
    y = (rms(outputs, config.epsilon) * wide(model.norm.scale)).reshape(len(row), -1)
    return apply(model.output, y * silu(low_rank(model.gate, row))), states


@pytest.mark.parametrize("negative", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_equals_the_equation(negative):
    model = drawn("sse_gdn", WIDTH, negative_eigenvalues=negative, **OPTIONS)
    x = tokens(TIME, WIDTH)
    got, state = in_two_calls(model, x)
    expected, states = zip(*(literal(model, row) for row in np.asarray(x, np.float64)), strict=True)
    np.testing.assert_allclose(got, np.stack(expected), atol=5e-6)
    np.testing.assert_allclose(state.carried, np.stack(states).reshape(state.carried.shape), atol=5e-6)


@pytest.mark.slow
def test_outputs_train_the_router():
    """The shares stand where no norm divides them out."""
    model, x = drawn("sse_gdn", WIDTH, **OPTIONS), tokens(TIME, WIDTH)
    graph, variables = nnx.split(model)

    @jax.jit
    def gradient(variables):
        return jax.grad(lambda v: nnx.merge(graph, v, copy=True)(x)[0].std(), allow_int=True)(variables)

    assert jnp.abs(gradient(variables)["router"]["kernel"][...]).max() > 1e-3


@pytest.mark.slow
def test_a_partition_that_no_token_chooses_stays_as_it_is():
    model, x = drawn("sse_gdn", WIDTH, **OPTIONS), tokens(TIME, WIDTH)
    x = x.at[..., 0].set(4.0)
    model.router.kernel[...] = (
        jnp.zeros_like(model.router.kernel[...]).at[0].set(jnp.asarray([2.0, -2.0, 1.0, -1.0]))
    )
    state = model.init_state(2, max_length=TIME)
    start = jnp.asarray(np.random.default_rng(2).standard_normal(state.carried.shape), jnp.float32)
    _, after = model(x, state._replace(carried=start))
    same = (after.carried == start).reshape(2, 2, 1 + PARTITIONS, -1).all((0, 1, 3))
    np.testing.assert_array_equal(same, [False, False, True, False, True])
