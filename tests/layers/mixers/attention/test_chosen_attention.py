"""Reformer and Informer against their equations in NumPy, and what they become where they leave nothing out."""

import jax.numpy as jnp
import numpy as np
import pytest

from layers.mixers.attention.informer import sampled_keys
from tests.layers.mixers.literal import apply, by_row, drawn, heads, softmax, tokens, wide

WIDTH, HEADS, TIME, CHUNK = 6, 2, 23, 4
PACKED = jnp.asarray([[1] * 14 + [2] * 9, [1] * 3 + [0] * 20])
PARTS = (0, slice(0, 14)), (0, slice(14, 23)), (1, slice(0, 3))


def each_alone(model, literal):
    """Packed sequences of unlike lengths against each by itself."""
    x = tokens(TIME, WIDTH)
    got, rows = np.asarray(model(x, segment_ids=PACKED)[0]), np.asarray(x, np.float64)
    for row, part in PARTS:
        np.testing.assert_allclose(got[row, part], literal(model, rows[row, part]), atol=1e-5)


def reformer(model, x):
    q, v = (heads(apply(f, x), HEADS) for f in (model.query, model.value))
    k = q / np.sqrt((q**2).mean(-1, keepdims=True) + 1e-6) / np.sqrt(q.shape[2])
    size, t, y = min(model.config.chunk, TIME), len(x), np.zeros_like(q)
    for h in range(HEADS):
        found = [[] for _ in range(t)]
        for rotation in wide(model.rotations)[:, h]:
            products = q[:, h] @ rotation
            bucket = np.argmax(np.concatenate([products, -products], axis=1), axis=1)
            order = sorted(range(t), key=lambda i: (bucket[i], i))
            chunks = [order[start : start + size] for start in range(0, t, size)]
            for n, chunk in enumerate(chunks):
                seen = chunk + (chunks[n - 1] if len(chunks) > 1 else [])
                for i in chunk:
                    found[i] += [j for j in seen if j != i]
        for i in range(t):
            keys = found[i] or [i]
            y[i, h] = softmax(np.array([q[i, h] @ k[j, h] for j in keys])) @ v[keys, h]
    return apply(model.output, y.reshape(t, -1))


@pytest.mark.sample(2)
@pytest.mark.parametrize("rounds", [3, 1])
def test_reformer_equals_its_equation(rounds):
    """Keys of several rounds in one softmax, one per round that finds them; the chunk before the first is the last."""
    model = drawn("reformer", WIDTH, heads=HEADS, chunk=CHUNK, buckets=6, rounds=rounds)
    x = tokens(TIME, WIDTH)
    np.testing.assert_allclose(model(x)[0], by_row(lambda x: reformer(model, x), x), atol=1e-5)


@pytest.mark.slow
def test_reformer_leaves_out_what_stands_behind_a_sequence():
    each_alone(drawn("reformer", WIDTH, heads=HEADS, chunk=CHUNK, buckets=6, rounds=2, bias=True), reformer)


@pytest.mark.slow
def test_reformer_with_one_chunk_is_attention_without_itself():
    model = drawn("reformer", WIDTH, heads=HEADS, chunk=TIME, buckets=2, rounds=2)

    def literal(x):
        q, v = (heads(apply(f, x), HEADS) for f in (model.query, model.value))
        k = q / np.sqrt((q**2).mean(-1, keepdims=True) + 1e-6) / np.sqrt(q.shape[2])
        y = np.zeros_like(q)
        for h in range(HEADS):
            logits = q[:, h] @ k[:, h].T
            np.fill_diagonal(logits, -np.inf)
            y[:, h] = np.stack([softmax(row) for row in logits]) @ v[:, h]
        return apply(model.output, y.reshape(len(x), -1))

    x = tokens(TIME, WIDTH)
    np.testing.assert_allclose(model(x)[0], by_row(literal, x), atol=1e-5)


def informer(model, x):
    t = len(x)
    q, k, v = (heads(apply(f, x), HEADS) for f in (model.query, model.key, model.value))
    count = min(t, max(1, int(np.ceil(model.config.factor * np.log(t)))))
    keys = np.asarray(sampled_keys(model.seed[...], count, t, jnp.asarray([t])))[0]
    y = np.broadcast_to(v.mean(0), v.shape).copy()
    for h in range(HEADS):
        products = np.stack([[q[i, h] @ k[j, h] for j in keys[:, i]] for i in range(t)])
        measure = products.max(1) - products.sum(1) / t
        for i in np.argsort(-measure, kind="stable")[:count]:
            y[i, h] = softmax(k[:, h] @ q[i, h] / np.sqrt(q.shape[2])) @ v[:, h]
    return apply(model.output, y.reshape(t, -1))


def test_informer_equals_its_equation():
    model = drawn("informer", WIDTH, heads=HEADS, factor=2, bias=True)
    x = tokens(TIME, WIDTH)
    np.testing.assert_allclose(model(x)[0], by_row(lambda x: informer(model, x), x), atol=1e-5)


@pytest.mark.slow
def test_informer_samples_and_chooses_by_the_length_of_each_sequence():
    each_alone(drawn("informer", WIDTH, heads=HEADS, factor=2), informer)


def test_samples_of_informer_cover_the_keys_and_differ_by_layer():
    lengths = jnp.asarray([9, 40])
    first, second = (np.asarray(sampled_keys(jnp.asarray(float(layer)), 30, 40, lengths)) for layer in (0, 1))
    assert set(first[0].ravel()) == set(range(9))
    assert set(first[1].ravel()) == set(range(40))
    assert (first != second).any()
