"""Latent attention to chosen tokens against its equation in NumPy, whole, in calls, absorbed, and the loss of its indexer."""

import numpy as np
import pytest
from flax import nnx

from layers.parts import lightning_indexer
from tests.layers.mixers.attention import indexer_loss
from tests.layers.mixers.literal import (
    apply,
    by_row,
    drawn,
    heads,
    in_calls,
    layer_norm,
    masked_softmax,
    rms,
    tokens,
    wide,
)

WIDTH, HEADS, TIME, TOP = 8, 3, 12, 4
# Features per head: of keys without position and of values, of the latent vector, of the rotated part.
KEY, VALUE, LATENT, TURNED, INDEX = 4, 5, 6, 2, 6
SIZES = {"heads": HEADS, "latent": LATENT, "head_dim": KEY, "rope_dim": TURNED, "value_dim": VALUE}
OPTIONS = SIZES | {"query_latent": 5, "top_k": TOP, "index_heads": 3, "index_dim": INDEX}
YARN = {"name": "rope", "scaling": "yarn", "factor": 8.0, "length": 1000}


def turned(x):
    """The first two of the features of (t, h, n) as a complex number, which turns by its position."""
    pair = (x[..., 0] + 1j * x[..., 1]) * np.exp(1j * np.arange(len(x)))[:, None]
    return np.concatenate([np.stack([pair.real, pair.imag], -1), x[..., 2:]], -1)


def literal(model, x):
    """Outputs, and KL(p || softmax(s)) over what each query sees."""
    t, indexer = len(x), model.indexer
    u = x
    if model.query_down is not None:
        u = rms(apply(model.query_down, x), 1e-6) * wide(model.query_norm.scale)
    q = heads(apply(model.query, u), HEADS)
    q, q_turned = q[..., :KEY], turned(q[..., KEY:])
    latent = apply(model.latent, x)
    c, k_turned = (
        rms(latent[:, :LATENT], 1e-6) * wide(model.latent_norm.scale),
        turned(latent[:, None, LATENT:]),
    )
    kv = heads(apply(model.expand, c), HEADS)

    index_q = turned(heads(apply(indexer.query, u), 3))
    index_k = layer_norm(apply(indexer.key, x), 1e-6) * wide(indexer.norm.scale) + wide(indexer.norm.bias)
    index_k = turned(index_k[:, None])[:, 0]
    weight = apply(indexer.weight, x) / np.sqrt(3)
    scores, seen = np.zeros((t, t)), np.zeros((t, t), bool)
    for i in range(t):
        for j in range(i + 1):
            for n in range(3):
                scores[i, j] += weight[i, n] * max(index_q[i, n] @ index_k[j] / np.sqrt(INDEX), 0)
        seen[i, np.argsort(-scores[i, : i + 1], kind="stable")[:TOP]] = True

    outputs, weights = [], []
    for h in range(HEADS):
        logits = q[:, h] @ kv[:, h, :KEY].T + q_turned[:, h] @ k_turned[:, 0].T
        weights.append(masked_softmax(logits / np.sqrt(KEY + TURNED), seen))
        outputs.append(weights[h] @ kv[:, h, KEY:])
    p, guess = np.mean(weights, 0), masked_softmax(scores, seen)
    divergence = np.where(seen, p * np.log(np.where(seen, p, 1) / np.where(seen, guess, 1)), 0).sum(1)
    return apply(model.output, np.stack(outputs, 1).reshape(t, -1)), divergence


@pytest.mark.parametrize(
    "absorbed, query_latent, queries",
    [
        (None, 5, 128),
        pytest.param(True, 5, 3, marks=pytest.mark.slow),
        pytest.param(False, None, 3, marks=pytest.mark.slow),
    ],
)
def test_equals_the_equation_in_parts(monkeypatch, absorbed, query_latent, queries):
    monkeypatch.setattr(lightning_indexer, "QUERIES", queries)
    options = OPTIONS | {"absorbed": absorbed, "query_latent": query_latent}
    model, x = drawn("sparse_mla", WIDTH, **options), tokens(TIME, WIDTH)
    got, state = in_calls(model, x, 3)
    np.testing.assert_allclose(got, by_row(lambda row: literal(model, row)[0], x), atol=1e-5)
    assert sum(entry[0, 0].size for entry in state.carried.entries) == LATENT + TURNED + INDEX


@pytest.mark.slow
def test_steps_and_whole_rows_equal_the_equation():
    model, x = drawn("sparse_mla", WIDTH, **OPTIONS), tokens(TIME, WIDTH)
    want = by_row(lambda row: literal(model, row)[0], x)
    np.testing.assert_allclose(in_calls(model, x, TIME)[0], want, atol=1e-5)
    np.testing.assert_allclose(model(x)[0], want, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("position", ["rope", "none", YARN])
def test_with_all_tokens_chosen_it_is_latent_attention(position):
    model = drawn("sparse_mla", WIDTH, **OPTIONS | {"top_k": TIME, "position": position})
    plain, x = drawn("mla", WIDTH, **SIZES, query_latent=5, position=position), tokens(TIME, WIDTH)
    shared = {name: value for name, value in nnx.to_flat_state(nnx.state(model)) if name[0] != "indexer"}
    nnx.update(plain, nnx.from_flat_state(shared))
    np.testing.assert_allclose(model(x)[0], plain(x)[0], atol=1e-5)


@pytest.mark.slow
def test_the_loss_in_training_is_of_real_tokens_and_trains_the_indexer_alone():
    model, x = drawn("sparse_mla", WIDTH, index_loss=0.5, **OPTIONS), tokens(TIME, WIDTH)
    # Weights and scores far from equal.
    for linear in (model.query, model.indexer.weight):
        linear.kernel[...] *= 8
    indexer_loss.check(model, x, literal)
