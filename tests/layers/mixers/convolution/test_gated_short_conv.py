"""LFM2's gated short convolution against its equation in NumPy, over two calls."""

import numpy as np

from tests.layers.mixers.literal import apply, by_row, drawn, filtered, in_two_calls, tokens, wide

WIDTH, TIME = 6, 12


def literal(model, row):
    before, after, u = np.split(apply(model.input, row), 3, axis=1)
    u = filtered(before * u, wide(model.convolution.weight)) + wide(model.convolution.bias)
    return apply(model.output, after * u)


def test_equals_the_equation():
    model, x = drawn("gated_short_conv", WIDTH, bias=True), tokens(TIME, WIDTH)
    got, _ = in_two_calls(model, x)
    np.testing.assert_allclose(got, by_row(lambda row: literal(model, row), x), atol=1e-5)
