"""The attention mixer against its equation in NumPy, and its cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.mixers.attention import Attention, AttentionConfig

WIDTH, TIME = 8, 11


def make(**options):
    return Attention(AttentionConfig(width=WIDTH, **options), rngs=nnx.Rngs(0))


def inputs(time=TIME):
    return jax.random.normal(jax.random.key(0), (2, time, WIDTH))


def literal(model, x):
    """Softmax attention head by head in float64, rotations as complex numbers."""
    config = model.config
    x = np.asarray(x, np.float64)
    kernel = {
        name: np.asarray(getattr(model, name).kernel[...], np.float64)
        for name in ("query", "key", "value", "output")
    }
    size, time = config.size, x.shape[1]
    turn = np.exp(1j * np.arange(time)[:, None] * config.rope_base ** (-np.arange(0, size, 2) / size))

    def rotate(v):
        pairs = (v[:, : size // 2] + 1j * v[:, size // 2 :]) * turn
        return np.concatenate([pairs.real, pairs.imag], axis=1)

    rows = []
    for row in x:
        heads = []
        for head in range(config.heads):
            group = head // (config.heads // config.groups)
            q = rotate((row @ kernel["query"])[:, head * size : (head + 1) * size])
            k = rotate((row @ kernel["key"])[:, group * size : (group + 1) * size])
            v = (row @ kernel["value"])[:, group * size : (group + 1) * size]
            logits = q @ k.T / np.sqrt(size)
            i, j = np.indices((time, time))
            seen = (j <= i) if config.causal else np.ones_like(i, bool)
            if config.window is not None:
                seen &= (i - j < config.window) if config.causal else (abs(i - j) <= config.window)
            weights = np.exp(logits - logits.max()) * seen
            heads.append(weights / weights.sum(1, keepdims=True) @ v)
        rows.append(np.concatenate(heads, axis=1) @ kernel["output"])
    return np.stack(rows)


@pytest.mark.parametrize(
    "options",
    [
        {"heads": 2},
        {"heads": 4, "kv_heads": 2, "causal": False},
        {"heads": 4, "kv_heads": 1, "window": 3},
        {"heads": 1, "head_dim": 4, "causal": False, "window": 2, "rope_base": 100.0},
    ],
)
def test_equals_the_equation(options):
    model = make(**options)
    np.testing.assert_allclose(model(inputs())[0], literal(model, inputs()), atol=2e-6)


def test_grouped_heads_with_copied_keys_and_values_equal_full_heads():
    grouped, full = make(heads=4, kv_heads=2), make(heads=4)
    for name in ("query", "output"):
        getattr(full, name).kernel[...] = getattr(grouped, name).kernel[...]
    for name in ("key", "value"):
        kernel = getattr(grouped, name).kernel[...].reshape(WIDTH, 2, -1)
        getattr(full, name).kernel[...] = jnp.repeat(kernel, 2, axis=1).reshape(WIDTH, -1)
    np.testing.assert_allclose(grouped(inputs())[0], full(inputs())[0], atol=1e-6)


def test_tokens_beyond_the_cache_are_nan_and_the_others_right():
    model = make(heads=2)
    want, _ = model(inputs())
    got, _ = model(inputs(), model.init_state(2, max_length=7))
    np.testing.assert_allclose(got[:, :7], want[:, :7], atol=1e-6)
    assert np.isnan(got[:, 7:]).all()


def test_a_window_keeps_a_cache_of_its_size_for_any_length():
    model = make(heads=2, window=4)
    state = model.init_state(2)
    assert state.k.shape[1] == 4
    want, _ = model(inputs(40))
    outputs = []
    for start in range(0, 40, 5):
        y, state = model(inputs(40)[:, start : start + 5], state)
        outputs.append(y)
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), want, atol=1e-6)


def test_a_cache_needs_a_length():
    with pytest.raises(ValueError, match="max_length"):
        make(heads=2).init_state(1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"heads": 3}, "heads=3 does not divide width=8"),
        ({"heads": 4, "kv_heads": 3}, "kv_heads=3 does not divide heads=4"),
        ({"heads": 8}, "head_dim=1 is odd"),
        ({"heads": 2, "window": 0}, "window=0"),
        ({"heads": 2, "position": "learnt"}, "position='learnt'"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionConfig(width=WIDTH, **options)
