"""DeepSeek sparse attention against its equation in NumPy, whole and in two calls, and the loss of its indexer."""

import numpy as np
import pytest

from layers.parts import lightning_indexer
from tests.layers.mixers.attention import indexer_loss
from tests.layers.mixers.literal import (
    apply,
    by_row,
    drawn,
    heads,
    in_two_calls,
    layer_norm,
    masked_softmax,
    tokens,
    wide,
)

WIDTH, HEADS, KV, TIME, TOP = 8, 4, 2, 12, 4
OPTIONS = {"heads": HEADS, "kv_heads": KV, "head_dim": 4, "top_k": TOP, "index_heads": 3, "index_dim": 6}


def rotated(x):
    """RoPE: feature i and i + n / 2 of (t, h, n) turn by position * 10000^(-2 i / n)."""
    half = x.shape[2] // 2
    angle = np.arange(len(x))[:, None, None] * 10_000.0 ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def literal(model, x):
    """Outputs, and KL(p || softmax(s)) over what each query sees."""
    t, config, indexer = len(x), model.config, model.indexer
    q, k = rotated(heads(apply(model.query, x), HEADS)), rotated(heads(apply(model.key, x), KV))
    v = heads(apply(model.value, x), KV)
    index_q = rotated(heads(apply(indexer.query, x), config.index_heads))
    index_k = layer_norm(apply(indexer.key, x), 1e-6) * wide(indexer.norm.scale)
    index_k = rotated((index_k + wide(indexer.norm.bias))[:, None])[:, 0]
    weight = apply(indexer.weight, x) / np.sqrt(config.index_heads)
    scores = np.zeros((t, t))
    for n in range(config.index_heads):
        scores += weight[:, n : n + 1] * np.maximum(index_q[:, n] @ index_k.T / np.sqrt(6), 0)
    seen = np.zeros((t, t), bool)
    for i in range(t):
        seen[i, np.argsort(-scores[i, : i + 1], kind="stable")[:TOP]] = True
    weights = np.stack(
        [masked_softmax(q[:, h] @ k[:, h // 2].T / np.sqrt(q.shape[2]), seen) for h in range(HEADS)]
    )
    y = np.stack([weights[h] @ v[:, h // 2] for h in range(HEADS)], axis=1)
    p, guess = weights.mean(0), masked_softmax(scores, seen)
    divergence = np.where(seen, p * np.log(np.where(seen, p, 1) / np.where(seen, guess, 1)), 0).sum(1)
    return apply(model.output, y.reshape(t, -1)), divergence


@pytest.mark.parametrize("queries", [128, pytest.param(5, marks=pytest.mark.slow)])
def test_equals_the_equation(monkeypatch, queries):
    monkeypatch.setattr(lightning_indexer, "QUERIES", queries)
    model, x = drawn("dsa", WIDTH, **OPTIONS), tokens(TIME, WIDTH)
    want = by_row(lambda row: literal(model, row)[0], x)
    np.testing.assert_allclose(in_two_calls(model, x)[0], want, atol=1e-5)


@pytest.mark.slow
def test_the_loss_in_training_is_of_real_tokens_and_trains_the_indexer_alone():
    model, x = drawn("dsa", WIDTH, index_loss=0.5, **OPTIONS), tokens(TIME, WIDTH)
    indexer_loss.check(model, x, literal)
