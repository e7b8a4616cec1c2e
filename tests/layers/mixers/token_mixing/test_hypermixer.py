"""HyperMixer against its equation in NumPy, without order, and its initial weights."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf

from layers.mixers.token_mixing.hypermixer import HyperMixer, HyperMixerConfig
from tests.layers.mixers.literal import wide

WIDTH, TIME = 6, 9
X = np.random.default_rng(0).standard_normal((2, TIME, WIDTH)).astype(np.float32)


def make(**options):
    return HyperMixer(HyperMixerConfig(WIDTH, **{"hidden": 8, **options}), rngs=nnx.Rngs(0))


def gelu(x):
    return x * (1 + erf(x / np.sqrt(2))) / 2


def sinusoids():
    angle = np.arange(TIME)[:, None] * 10_000.0 ** (-np.arange(0, WIDTH, 2) / WIDTH)
    return np.stack([np.sin(angle), np.cos(angle)], -1).reshape(TIME, WIDTH)


def literal(model, x):
    config = model.config
    source = x + sinusoids() if config.position == "sinusoid" else x
    outputs = []
    for head in range(config.heads):
        part = slice(head * WIDTH // config.heads, (head + 1) * WIDTH // config.heads)
        made = [
            gelu(source[:, part] @ wide(i)[head]) @ wide(o)[head]
            for i, o in zip(model.inner, model.outer, strict=True)
        ]
        outputs.append(made[-1] @ gelu(made[0].T @ x[:, part]))
    y = np.concatenate(outputs, axis=1)
    if model.norm is None:
        return y
    return (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"heads": 2, "norm": False}, {"tied": True, "position": "none", "norm": False}]
)
def test_equals_the_equation(options):
    model = make(**options)
    got, _ = model(jnp.asarray(X))
    want = np.stack([literal(model, row.astype(np.float64)) for row in X])
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_without_positions_order_does_not_matter():
    order = np.random.default_rng(1).permutation(TIME)
    for position, blind in (("none", True), ("sinusoid", False)):
        model = make(position=position)
        turned = model(jnp.asarray(X[:, order]))[0]
        assert np.allclose(turned, model(jnp.asarray(X))[0][:, order], atol=1e-5) is blind


def test_tied_weights_are_stored_once():
    assert len(make(tied=True).inner) == 1
    assert len(make().inner) == 2


def test_initial_weights_are_xavier_with_gain_sqrt_2_in_every_head():
    model = HyperMixer(HyperMixerConfig(128, hidden=512, heads=2), rngs=nnx.Rngs(0))
    assert np.var(model.inner[0][...]) == pytest.approx(2 * 2 / (64 + 64), rel=0.05)
    assert np.var(model.outer[1][...]) == pytest.approx(2 * 2 / (64 + 256), rel=0.05)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"heads": 4}, "heads=4 does not divide width=6"),
        ({"heads": 3}, "heads=3 does not divide hidden=8"),
        ({"position": "rope"}, "position='rope'"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
