"""Mamba-2 with the options of Falcon-H1 and Nemotron-H against its recurrence in NumPy, over two calls."""

import numpy as np
import pytest

from tests.layers.mixers.literal import (
    apply,
    by_row,
    drawn,
    filtered,
    heads,
    in_two_calls,
    rms,
    silu,
    softplus,
    tokens,
    wide,
)

WIDTH, TIME = 6, 10
OPTIONS = {"inner": 8, "state_size": 3, "head_dim": 2, "groups": 2, "scales": (0.5, 1.5, 0.8, 1.2, 2.0)}


def literal(model, row):
    config = model.config
    channels, count, groups, n = config.channels, config.heads, config.groups, config.state_size
    sizes = (channels, channels, groups * n, groups * n, count)
    ends = np.cumsum(sizes)[:-1]
    parts = np.split(apply(model.input, row), ends, axis=1)
    z, u, key, query, dt = (scale * part for scale, part in zip(config.scales, parts, strict=True))
    mixed = filtered(np.concatenate([u, key, query], 1), wide(model.convolution.weight))
    u, key, query = np.split(silu(mixed + wide(model.convolution.bias)), ends[1:3] - channels, axis=1)
    u, dt = heads(u, count), softplus(dt + wide(model.dt_bias))
    key, query = (np.repeat(heads(part, groups), count // groups, axis=1) for part in (key, query))
    state, o = np.zeros((count, n, config.head_dim)), np.zeros(u.shape)
    for t in range(len(row)):
        decay = np.exp(-dt[t] * np.exp(wide(model.log_a)))[:, None, None]
        state = decay * state + key[t][:, :, None] * (dt[t][:, None] * u[t])[:, None]
        o[t] = np.einsum("hnp,hn->hp", state, query[t]) + wide(model.d)[:, None] * u[t]
    y, gate = o.reshape(len(row), channels), silu(z)

    def norm(y):
        grouped = rms(y.reshape(len(row), groups, -1), config.epsilon)
        return grouped.reshape(y.shape) * wide(model.scale)

    gated = {"after": lambda: norm(y * gate), "before": lambda: norm(y) * gate, "none": lambda: y * gate}
    return apply(model.output, gated[config.norm]())


@pytest.mark.parametrize("norm", [pytest.param("after", marks=pytest.mark.slow), "before", "none"])
def test_equals_the_equation(norm):
    model, x = drawn("mamba2", WIDTH, norm=norm, **OPTIONS), tokens(TIME, WIDTH)
    got, _ = in_two_calls(model, x)
    np.testing.assert_allclose(got, by_row(lambda row: literal(model, row), x), atol=1e-5)
