"""RWKV-7 against its recurrence in NumPy, and its initial values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.mixers.delta_rule.rwkv7 import RWKV7, RWKV7Config
from tests.layers.mixers.literal import apply, by_row, heads, low_rank, sigmoid, stirred, wide

WIDTH, TIME = 8, 13


def make(**options):
    options = {"head_dim": 4, "decay_rank": 3, "rate_rank": 2, "gate_rank": 5, "zero_init": False} | options
    return RWKV7(RWKV7Config(width=WIDTH, **options), rngs=nnx.Rngs(0))


def inputs(time=TIME, seed=0):
    return jax.random.normal(jax.random.key(seed), (2, time, WIDTH))


def literal(model, row):
    """The state as the authors write it, values by keys and multiplied from the right."""
    config = model.config
    count = config.heads
    before = np.concatenate([np.zeros((1, WIDTH)), row[:-1]])
    r, w, k, v, a, g = (row + mu * (before - row) for mu in wide(model.mixing))
    r, k, v = apply(model.receptance, r), apply(model.key, k), apply(model.value, v)
    w = np.exp(-np.exp(-0.5) * sigmoid(low_rank(model.decay, w, np.tanh)))
    a = sigmoid(low_rank(model.rate, a))
    g = low_rank(model.gate, g, sigmoid)
    kappa = heads(k * wide(model.removal), count)
    kappa = kappa / np.linalg.norm(kappa, axis=-1, keepdims=True)
    k = k * (1 + (a - 1) * wide(model.replacement))
    r, w, k, v, a = (heads(u, count) for u in (r, w, k, v, a))
    outputs = np.zeros_like(v)
    for h in range(count):
        state = np.zeros((config.head_dim, config.head_dim))
        for t in range(len(row)):
            transition = np.diag(w[t, h]) - np.outer(kappa[t, h], a[t, h] * kappa[t, h])
            state = state @ transition + np.outer(v[t, h], k[t, h])
            o = state @ r[t, h]
            outputs[t, h] = (o - o.mean()) / np.sqrt(o.var() + config.epsilon * config.head_dim)
    y = outputs.reshape(len(row), -1) * wide(model.norm.scale) + wide(model.norm.bias)
    y = y + (np.sum(r * k * wide(model.bonus), -1, keepdims=True) * v).reshape(len(row), -1)
    return apply(model.output, y * g)


@pytest.mark.sample(2)
@pytest.mark.parametrize("options", [{}, {"layer": 3, "depth": 5, "head_dim": 2}])
def test_equals_the_equation(options):
    model, x = stirred(make(**options)), inputs()
    np.testing.assert_allclose(model(x)[0], by_row(lambda row: literal(model, row), x), atol=1e-5)


def test_starts_as_the_authors_code():
    width, size, layer, depth = 128, 64, 2, 6
    model = RWKV7(RWKV7Config(width=width, layer=layer, depth=depth), rngs=nnx.Rngs(0))
    assert model.config.ranks == (32, 32, 64, 32)
    n = 100
    early, late = 1 - layer / depth, layer / (depth - 1)
    zigzag = ((n % size - 31.5) / 31.5) ** 2 * np.sign(n % size - 31.5)
    linear = n / (width - 1) - 0.5
    for stream, power in enumerate((0.2, 0.9, 0.7, 0.7, 0.9, 0.2)):
        assert model.mixing[stream, n] == pytest.approx(1 - (n / width) ** (power * early), rel=1e-5)
    decay = -6 + 6 * (n / (width - 1)) ** (1 + late**0.3) + 0.5 + 2.5 * zigzag
    assert model.decay.outer.bias[n] == pytest.approx(decay, rel=1e-5)
    assert model.rate.outer.bias[n] == pytest.approx(-0.19 + 0.3 * zigzag + 0.4 * linear, rel=1e-4)
    assert model.removal[n] == pytest.approx(0.71 - 0.1 * linear, rel=1e-5)
    np.testing.assert_allclose(model.norm.scale[...], 0.5**0.7, rtol=1e-5)
    assert not np.any(model.output.kernel[...])
    for name in ("decay", "rate", "gate"):
        assert not np.any(getattr(model, name).inner.kernel[...])
        outer = np.asarray(getattr(model, name).outer.kernel[...], np.float64)
        np.testing.assert_allclose(outer @ outer.T, 0.01 * np.eye(len(outer)), atol=1e-6)
    for name, bound in (("receptance", 0.5), ("key", 0.05), ("value", 0.5)):
        largest = np.abs(getattr(model, name).kernel[...]).max() * np.sqrt(width)
        assert 0.95 * bound < largest <= bound


@pytest.mark.slow
def test_no_channel_forgets_faster_than_the_bound():
    """A token whose key is zero only lets the memory decay: by 0.545 at the least, however large the input."""
    model = make(head_dim=8)
    model.mixing[...] = jnp.zeros((6, WIDTH))
    model.key.kernel[...] = model.key.kernel[...].at[1:].set(0.0)
    _, first = model(inputs(1), model.init_state(2))
    _, second = model((1e4 * inputs(1, seed=1)).at[..., 0].set(0.0), first)
    ratio = np.asarray(second.carried.memory / first.carried.memory)
    assert ratio.min() >= np.exp(-np.exp(-0.5)) - 1e-5
    assert ratio.max() <= 1
    # Large inputs reach both ends.
    assert ratio.min() < 0.57
    assert ratio.max() > 0.99


def test_a_full_rate_erases_what_a_key_held():
    """w = 1, a = 1 and a repeated key: the memory holds the last value alone, as under the plain delta rule."""
    model = make(head_dim=8)
    model.decay.outer.bias[...] = jnp.full(WIDTH, -100.0)
    model.rate.outer.bias[...] = jnp.full(WIDTH, 100.0)
    model.removal[...] = jnp.ones(WIDTH)
    model.mixing[...] = jnp.zeros((6, WIDTH))
    model.key.kernel[...] = jnp.zeros((WIDTH, WIDTH)).at[0].set(jnp.arange(1.0, 9.0))
    x = inputs().at[..., 0].set(1.0)
    _, state = model(x, model.init_state(2))
    want = jnp.arange(1.0, 9.0)[None, :, None] * model.value(x)[:, -1, None]
    np.testing.assert_allclose(state.carried.memory[:, 0], want, atol=2e-5)


def test_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="head_dim=64 does not divide width=100"):
        RWKV7Config(width=100)
    with pytest.raises(ValueError, match="layer=2, depth=2"):
        RWKV7Config(width=64, layer=2, depth=2)
    with pytest.raises(ValueError, match="rate_rank=0"):
        RWKV7Config(width=64, rate_rank=0)
