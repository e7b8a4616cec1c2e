"""Differential attention against its equation in NumPy, over two calls."""

import numpy as np
import pytest
from flax import nnx

from layers.mixers.attention.differential_attention import DifferentialAttention, DifferentialAttentionConfig
from tests.layers.mixers.literal import apply, by_row, drawn, heads, in_two_calls, rms, softmax, tokens, wide

WIDTH, TIME = 8, 12


def rotated(x):
    """(t, h, k) with pairs (i, i + k/2) turned by position * 10000^(-2i/k)."""
    half = x.shape[2] // 2
    angles = np.arange(len(x))[:, None, None] * 10_000.0 ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def literal(model, row):
    config = model.config
    q = rotated(heads(apply(model.query, row), 2 * config.heads))
    k = rotated(heads(apply(model.key, row), 2 * config.groups))
    v = heads(apply(model.value, row), config.groups)
    q1, k1, q2, k2 = wide(model.weights)
    start = wide(model.start)
    weight = np.exp(q1 @ k1) - np.exp(q2 @ k2) + start
    shared = config.heads // config.groups
    outputs = np.zeros((len(row), config.heads, 2 * config.size))
    for h in range(config.heads):
        for t in range(len(row)):
            seen = slice(0 if config.window is None else max(0, t - config.window + 1), t + 1)
            first, second = (
                softmax(k[seen, (2 * h + i) // shared] @ q[t, 2 * h + i] / np.sqrt(config.size))
                for i in (0, 1)
            )
            outputs[t, h] = (first - weight * second) @ v[seen, h // shared]
    y = rms(outputs, config.epsilon) * wide(model.norm.scale) * (1 - start)
    return apply(model.output, y.reshape(len(row), -1))


@pytest.mark.parametrize(
    "options",
    [
        {"heads": 2, "kv_heads": 1, "head_dim": 4, "window": 5},
        pytest.param({"heads": 2}, marks=pytest.mark.slow),
    ],
)
def test_equals_the_equation(options):
    model, x = drawn("differential_attention", WIDTH, **options), tokens(TIME, WIDTH)
    got, _ = in_two_calls(model, x)
    np.testing.assert_allclose(got, by_row(lambda row: literal(model, row), x), atol=1e-5)


@pytest.mark.slow
def test_the_second_map_starts_at_weights_that_grow_with_the_layer():
    def start(layer):
        config = DifferentialAttentionConfig(8, heads=2, layer=layer, depth=9)
        return float(DifferentialAttention(config, rngs=nnx.Rngs(0)).start[...])

    starts = [start(layer) for layer in (0, 1, 8)]
    np.testing.assert_allclose(starts, [0.2, 0.8 - 0.6 * np.exp(-0.3), 0.8 - 0.6 * np.exp(-2.4)], rtol=1e-6)
