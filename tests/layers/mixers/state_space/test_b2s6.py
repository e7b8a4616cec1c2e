"""B2S6 against its equation in NumPy, block by block, over two calls."""

import numpy as np
import pytest

from tests.layers.mixers.literal import (
    apply,
    by_row,
    drawn,
    filtered,
    in_two_calls,
    silu,
    softplus,
    tokens,
    wide,
)

WIDTH, TIME, BLOCKS = 6, 12, 3


def literal(model, row):
    config = model.config
    channels, size = config.channels, config.state_size
    u, gate = np.split(apply(model.input, row), 2, axis=1)
    u = silu(filtered(u, wide(model.convolution.weight)) + wide(model.convolution.bias))
    y, part = np.zeros_like(u), channels // BLOCKS
    for block in range(BLOCKS):
        own = slice(block * part, (block + 1) * part)
        r, b, c = np.split(u[:, own] @ wide(model.selection)[block], [1, 1 + size], axis=1)
        dt = softplus(r + wide(model.dt_bias)[own])
        rates, h = -np.exp(wide(model.log_a)[own]), np.zeros((part, size))
        for t in range(len(row)):
            inputs = b[t] + wide(model.b_bias)[own]
            h = np.exp(dt[t][:, None] * rates) * h + (dt[t] * u[t, own])[:, None] * inputs
            y[t, own] = h @ c[t] + wide(model.d)[own] * u[t, own]
    return apply(model.output, y * silu(gate))


@pytest.mark.slow
def test_equals_the_equation():
    model, x = drawn("b2s6", WIDTH, blocks=BLOCKS, state_size=4), tokens(TIME, WIDTH)
    got, _ = in_two_calls(model, x)
    np.testing.assert_allclose(got, by_row(lambda row: literal(model, row), x), atol=1e-5)
