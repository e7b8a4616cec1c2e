"""Selective attention against its equation in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.mixers.attention.attention import Attention
from layers.mixers.attention.selective_attention import SelectiveAttention, SelectiveAttentionConfig
from layers.parts.attention_config import AttentionConfig

WIDTH, TIME = 8, 9
X = jax.random.normal(jax.random.key(0), (2, TIME, WIDTH))


def make(**options):
    options = {"heads": 2, "position": "none"} | options
    model = SelectiveAttention(SelectiveAttentionConfig(width=WIDTH, **options), rngs=nnx.Rngs(0))
    for name, seed in (("query_weight", 1), ("value_weight", 2)):
        weight = getattr(model, name)
        if weight is not None:
            weight[...] = jax.random.normal(jax.random.key(seed), weight.shape)
    if model.alpha is not None:
        model.alpha[...] = 0.3
    return model


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def literal(model, x):
    """One row in float64."""
    config, x = model.config, np.asarray(x, np.float64)
    maps = {
        n: np.asarray(getattr(model, n).kernel[...], np.float64) for n in ("query", "key", "value", "output")
    }
    i, j = np.indices((len(x), len(x)))
    seen = (j <= i) if config.causal else np.ones_like(i, bool)
    if config.window is not None:
        seen &= (
            ((i - j < config.window) | (j < config.sink_tokens))
            if config.causal
            else abs(i - j) <= config.window
        )
    heads = []
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        q, k, v = (x @ maps[n][:, part] for n in ("query", "key", "value"))
        tau, tau_v = np.ones(len(x)), np.ones(len(x))
        if model.query_weight is not None:
            tau += np.tanh(gelu(q) @ np.asarray(model.query_weight[head], np.float64))
        if model.alpha is not None:
            tau += np.log(seen.sum(1)) / (1 + np.exp(-0.3))
        if model.value_weight is not None:
            tau_v += np.tanh(gelu(v) @ np.asarray(model.value_weight[head], np.float64))
        weights = np.exp(tau[:, None] * (q @ k.T) / 2) * seen
        heads.append(weights / weights.sum(1, keepdims=True) @ (tau_v[:, None] * v))
    return np.concatenate(heads, 1) @ maps["output"]


@pytest.mark.sample(5)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 3, "sink_tokens": 2},
        {"causal": False},
        {"causal": False, "window": 2},
        {"token_temperature": False, "value_temperature": False},
    ],
)
def test_equals_the_equation(options):
    model = make(**options)
    for row, got in zip(X, model(X)[0], strict=True):
        np.testing.assert_allclose(got, literal(model, row), atol=2e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_keys_are_counted_in_the_segment(causal):
    model = make(causal=causal)
    ids = jnp.array([[0, 3, 3, 3, 3, 0, 5, 5, 5]] * 2)
    y, _ = model(X, segment_ids=ids)
    for row, got in zip(X, y, strict=True):
        for where in (slice(1, 5), slice(6, 9)):
            np.testing.assert_allclose(got[where], literal(model, row[where]), atol=2e-6)


def test_starts_near_attention():
    options = {"width": WIDTH, "heads": 2}
    model = SelectiveAttention(SelectiveAttentionConfig(**options), rngs=nnx.Rngs(0))
    plain = Attention(AttentionConfig(**options), rngs=nnx.Rngs(0))
    model.alpha[...] = -jnp.inf
    np.testing.assert_allclose(model(X)[0], plain(X)[0], atol=1e-6)


def test_the_position_alone_starts_as_in_the_authors_code():
    """Scores times 1 + exp(-exp(1.5)) log n before the mask and the softmax, n counting from 1."""
    options = {"heads": 2, "position": "none", "token_temperature": False, "value_temperature": False}
    model = SelectiveAttention(SelectiveAttentionConfig(width=WIDTH, **options), rngs=nnx.Rngs(0))
    for row, got in zip(X, model(X)[0], strict=True):
        q, k, v = (
            np.asarray(part(row), np.float64).reshape(TIME, 2, -1)
            for part in (model.query, model.key, model.value)
        )
        scores = np.einsum("ihk,jhk->hij", q, k) / np.sqrt(WIDTH // 2)
        scores *= 1 + np.exp(-np.exp(1.5)) * np.log(np.arange(1, TIME + 1))[None, :, None]
        weights = np.where(np.tri(TIME), np.exp(scores), 0)
        o = np.einsum("hij,jhk->ihk", weights / weights.sum(-1, keepdims=True), v).reshape(TIME, -1)
        np.testing.assert_allclose(got, o @ np.asarray(model.output.kernel[...], np.float64), atol=2e-6)


def test_no_temperature_at_all_is_refused():
    with pytest.raises(ValueError, match="which is the mixer 'attention'"):
        make(token_temperature=False, position_temperature=False, value_temperature=False)
    with pytest.raises(ValueError, match="turn one of them off"):
        make(causal=False, window=2, sink_tokens=1)
