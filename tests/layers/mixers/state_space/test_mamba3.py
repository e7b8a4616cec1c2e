"""Mamba-3 against its recurrence in NumPy, with complex states, over two calls."""

import numpy as np
import pytest
from flax import nnx

from layers.mixers.state_space.mamba3 import Mamba3, Mamba3Config
from tests.layers.mixers.literal import (
    apply,
    by_row,
    drawn,
    heads,
    in_two_calls,
    rms,
    sigmoid,
    silu,
    softplus,
    tokens,
    wide,
)

WIDTH, TIME = 6, 12
OPTIONS = {"state_size": 8, "head_dim": 3, "groups": 2, "rotated": 0.5}


def literal(model, row):
    """The pairs that rotate are complex numbers, and states turn in place of B and C."""
    config = model.config
    n, p, count, pairs, rank = config.state_size, config.head_dim, config.heads, config.pairs, config.rank
    channels, shared = config.channels, rank * config.groups * n
    parts = np.cumsum([channels, channels, shared, shared, count, count, count])
    z, u, b, c, dt, rate, share, angle = np.split(apply(model.input, row), parts, axis=1)
    dt, share = softplus(dt + wide(model.dt_bias)), sigmoid(share)
    fast = np.where(rate >= 0, 1 + rate, 1 / (1 - np.minimum(rate, 0)))
    alpha = np.exp(-dt * np.maximum(fast, config.rate_floor))
    inputs, gates, outputs = (
        np.ones((count, 1, p)) if rank == 1 else wide(factors)
        for factors in (model.inputs, model.gates, model.outputs)
    )
    u, z = heads(u, count)[:, :, None] * inputs, heads(z, count)[:, :, None] * gates

    def by_head(x, norm, offset):
        x = rms(x.reshape(len(x), rank, config.groups, n), config.epsilon) * wide(norm.scale)
        return np.repeat(x.swapaxes(1, 2), count // config.groups, axis=1) + offset

    def as_pairs(x):
        """Complex numbers: pairs that rotate, then the rest."""
        return np.concatenate([x[: 2 * pairs : 2] + 1j * x[1 : 2 * pairs : 2], x[2 * pairs :]])

    of_keys, of_queries = wide(model.offsets).reshape(2, count, rank, n)
    b = by_head(b, model.key_norm, of_keys)
    c = by_head(c, model.query_norm, of_queries)
    y = np.zeros((len(row), count, p))
    for h in range(count):
        state = np.zeros((n - pairs, p), complex)
        write = np.zeros_like(state)
        for t in range(len(row)):
            # Turning B and C forward turns the past, seen from now, backward.
            turn = np.ones(n - pairs, complex)
            turn[:pairs] = np.exp(-1j * dt[t, h] * np.pi * np.tanh(angle[t]))
            state = turn[:, None] * alpha[t, h] * (state + (1 - share[t, h]) * dt[t, h] * write)
            write = sum(np.outer(as_pairs(b[t, h, j]), u[t, h, j]) for j in range(rank))
            state = state + share[t, h] * dt[t, h] * write
            for j in range(rank):
                read = (as_pairs(c[t, h, j]).conj() @ state).real + wide(model.d)[h] * u[t, h, j]
                y[t, h] += outputs[h, j] * read * silu(z[t, h, j])
    return apply(model.output, y.reshape(len(row), -1))


@pytest.mark.parametrize(
    "options",
    [
        OPTIONS | {"rank": 2},
        pytest.param(OPTIONS, marks=pytest.mark.slow),
        pytest.param({"state_size": 5, "head_dim": 4, "rotated": 1.0}, marks=pytest.mark.slow),
    ],
)
def test_equals_the_equation(options):
    model, x = drawn("mamba3", WIDTH, **options), tokens(TIME, WIDTH)
    got, _ = in_two_calls(model, x)
    np.testing.assert_allclose(got, by_row(lambda row: literal(model, row), x), atol=1e-5)


@pytest.mark.parametrize("rank, shape", [(1, (2, 4, 5)), (3, (2, 4, 3, 5))])
def test_offsets_have_an_axis_of_inputs_only_where_there_are_several(rank, shape):
    """Checkpoints of a model with one input load as before."""
    options = {"width": 8, "expand": 2, "head_dim": 4, "state_size": 5, "rank": rank}
    model = nnx.eval_shape(lambda: Mamba3(Mamba3Config(**options), rngs=nnx.Rngs(0)))
    assert model.offsets.shape == shape
