"""Lightning Attention against its equation in NumPy, and its rates by head and layer."""

import jax
import numpy as np
import pytest
from flax import nnx

from layers.mixers.linear_attention.lightning_attention import LightningAttention, LightningAttentionConfig
from tests.layers.mixers.literal import apply, by_row, heads, rms, sigmoid, silu, stirred, wide

WIDTH, TIME = 8, 13


def make(**options):
    return LightningAttention(
        LightningAttentionConfig(width=WIDTH, **{"heads": 2, **options}), rngs=nnx.Rngs(0)
    )


def inputs(time=TIME):
    return jax.random.normal(jax.random.key(0), (2, time, WIDTH))


def literal(model, row):
    """The dense form: scores times the matrix of decays exp(-s (n - m)) for n >= m."""
    config = model.config
    q, k, v = (heads(silu(apply(getattr(model, n), row)), config.heads) for n in ("query", "key", "value"))
    n, m = np.indices((len(row), len(row)))
    outputs = np.zeros_like(v)
    for h in range(config.heads):
        layer = 1 - config.layer / max(config.depth - 1, 1e-5) + 1e-5
        slope = 2 ** (-8 * (h + 1) / config.heads) * layer
        outputs[:, h] = (q[:, h] @ k[:, h].T * np.where(n >= m, np.exp(-slope * (n - m)), 0)) @ v[:, h]
    normed = rms(outputs.reshape(len(row), -1), config.epsilon) * wide(model.norm.scale)
    return apply(model.output, sigmoid(apply(model.gate, row)) * normed)


@pytest.mark.parametrize("options", [{}, {"heads": 4, "head_dim": 3, "layer": 2, "depth": 6}])
def test_equals_the_equation(options):
    model, x = stirred(make(**options)), inputs()
    np.testing.assert_allclose(model(x)[0], by_row(lambda row: literal(model, row), x), atol=5e-6)


def test_rates_halve_from_head_to_head_and_fall_with_the_layer():
    rates = np.stack([make(heads=8, layer=layer, depth=5).rates[...] for layer in range(5)])
    np.testing.assert_allclose(rates[0], 2.0 ** -np.arange(1, 9), rtol=2e-5)
    np.testing.assert_allclose(rates[:4, 1:] / rates[:4, :-1], 0.5, rtol=1e-5)
    np.testing.assert_allclose(
        rates[1:4] / rates[0], np.array([[0.75], [0.5], [0.25]]).repeat(8, 1), rtol=1e-4
    )
    assert (rates[4] > 0).all()
    assert (rates[4] < 2e-5).all()


def test_rates_are_saved_but_not_trained():
    model = make()
    assert not any("rates" in path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)))
    assert any("rates" in path for path, _ in nnx.to_flat_state(nnx.state(model)))


def test_refuses_a_layer_beyond_the_last():
    with pytest.raises(ValueError, match="layer=3, depth=3"):
        LightningAttentionConfig(width=8, layer=3, depth=3)
