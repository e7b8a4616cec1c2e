"""TTT-Linear against its equation in NumPy, over two calls that end inside mini-batches."""

import numpy as np
import pytest

from tests.layers.mixers.literal import (
    apply,
    by_row,
    drawn,
    filtered,
    heads,
    in_two_calls,
    layer_norm,
    sigmoid,
    tokens,
    wide,
)

WIDTH, TIME = 8, 20


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def rotated(x, place):
    half = x.shape[-1] // 2
    angle = place * 10_000.0 ** (-np.arange(half) / half)
    a, b = x[:half], x[half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)])


def inner_gradient(weight, bias, scale, shift, k, v, epsilon):
    """By the Jacobian of the norm."""
    z = k @ weight + bias
    centred = z - z.mean()
    deviation = np.sqrt(np.mean(centred**2) + epsilon)
    unit, size = centred / deviation, len(z)
    jacobian = (np.eye(size) - np.ones((size, size)) / size - np.outer(unit, unit) / size) / deviation
    by_output = scale * unit + shift - (v - k)
    by_bias = jacobian.T @ (scale * by_output)
    return np.outer(k, by_bias), by_bias


def literal(model, row):
    config = model.config
    u = apply(model.shared, row)
    q, k = (
        heads(filtered(u, wide(part.weight)) + wide(part.bias), config.heads)
        for part in (model.query_filter, model.key_filter)
    )
    v = heads(apply(model.value, row), config.heads)
    strength = sigmoid(apply(model.token_rate, row)) / config.size
    outputs = np.zeros_like(v)
    for h in range(config.heads):
        scale, shift = wide(model.scale)[h], wide(model.shift)[h]
        start = wide(model.weight)[h], wide(model.bias)[h]
        for t in range(len(row)):
            place = t % config.mini_batch
            if place == 0:
                if t > 0:
                    start = after
                slope = np.zeros_like(start[0]), np.zeros_like(start[1])
            query, key = rotated(q[t, h], place), rotated(k[t, h], place)
            gradient = inner_gradient(*start, scale, shift, key, v[t, h], config.epsilon)
            slope = tuple(total + strength[t, h] * part for total, part in zip(slope, gradient, strict=True))
            rate = config.rate * max(1 / (place + 1) + wide(model.place_rate)[place], 0)
            after = tuple(part - rate * total for part, total in zip(start, slope, strict=True))
            read = layer_norm(query @ after[0] + after[1], config.epsilon)
            outputs[t, h] = query + scale * read + shift
    y = layer_norm(outputs.reshape(len(row), -1), config.epsilon)
    y = y * wide(model.norm.scale) + wide(model.norm.bias)
    return apply(model.output, y * gelu(apply(model.gate, row)))


@pytest.mark.parametrize(
    "options",
    [
        {"heads": 2, "mini_batch": 4, "rate": 2.0},
        pytest.param({"heads": 1}, marks=pytest.mark.slow),
    ],
)
def test_equals_the_equation(options):
    model, x = drawn("ttt_linear", WIDTH, **options), tokens(TIME, WIDTH)
    got, _ = in_two_calls(model, x)
    want = by_row(lambda row: literal(model, row), x)
    np.testing.assert_allclose(got, want, atol=1e-5)
