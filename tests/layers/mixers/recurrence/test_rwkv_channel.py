"""RWKV's channel mixing against its equations in NumPy, over two calls, and its initial mixing weights."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.mixers.recurrence.rwkv_channel import RWKVChannel, RWKVChannelConfig
from tests.layers.mixers.literal import apply, by_row, drawn, in_two_calls, sigmoid, tokens, wide

WIDTH, TIME = 6, 8


def literal(model, row):
    before = np.concatenate([np.zeros((1, row.shape[1])), row[:-1]])
    weights = [mu if model.config.version == 4 else 1 - mu for mu in wide(model.mixing)]
    mixed = [weight * row + (1 - weight) * before for weight in weights]
    y = apply(model.value, np.maximum(apply(model.key, mixed[0]), 0) ** 2)
    return y if model.config.version == 7 else sigmoid(apply(model.receptance, mixed[1])) * y


@pytest.mark.parametrize("version", [4, pytest.param(6, marks=pytest.mark.slow), 7])
def test_equals_the_equation(version):
    model, x = drawn("rwkv_channel", WIDTH, version=version, hidden=7), tokens(TIME, WIDTH)
    got, state = in_two_calls(model, x)
    np.testing.assert_allclose(got, by_row(lambda row: literal(model, row), x), atol=1e-5)
    np.testing.assert_array_equal(state.carried[:, 0], x[:, -1])


def test_the_first_layer_mixes_most_at_the_start():
    def mixing(version, layer):
        config = RWKVChannelConfig(width=4, version=version, layer=layer, depth=2)
        return np.asarray(RWKVChannel(config, rngs=nnx.Rngs(0)).mixing[...])

    share = np.arange(4) / 4
    np.testing.assert_allclose(mixing(4, 0), [share] * 2, atol=1e-7)
    np.testing.assert_allclose(mixing(6, 1), [1 - share**0.5] * 2, atol=1e-7)
    np.testing.assert_allclose(mixing(7, 1), [1 - share ** (1 / 16)], atol=1e-7)
    assert not jnp.any(RWKVChannel(RWKVChannelConfig(width=4), rngs=nnx.Rngs(0)).value.kernel[...])
