"""Causal attention with patterns, positions and weights of its own against equations in NumPy, pair by pair, whole and in two calls.

Shifted sparse attention, Shortformer's, Transformer-XL's, softplus attention, MoBA, NSA and landmarks.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.mixers.attention import landmark as landmark_module
from layers.mixers.attention import moba as moba_module
from layers.mixers.attention import nsa as nsa_module
from layers.mixers.attention import softplus_attention as softplus_module
from layers.mixers.attention import transformer_xl as xl_module
from tests.layers.mixers.literal import (
    apply,
    by_row,
    drawn,
    heads,
    in_two_calls,
    masked_softmax,
    sigmoid,
    softmax,
    softplus,
    tokens,
    wide,
)

WIDTH, HEADS, KV, TIME = 8, 4, 2, 26
ATTENTION = {"heads": HEADS, "kv_heads": KV, "position": "none"}


def attended(model, x, seen_by):
    """The output, given which keys (t, s) a head sees."""
    q, k, v = (heads(apply(f, x), n) for f, n in ((model.query, HEADS), (model.key, KV), (model.value, KV)))
    y = np.zeros_like(q)
    for h in range(HEADS):
        keys, values = k[:, h // (HEADS // KV)], v[:, h // (HEADS // KV)]
        logits = q[:, h] @ keys.T
        y[:, h] = masked_softmax(logits / np.sqrt(q.shape[2]), seen_by(h, logits, q[:, h], keys)) @ values
    return apply(model.output, y.reshape(len(x), -1))


def shifted(model, x):
    config, t = model.config, len(x)

    def seen(h, *_):
        shift = config.group // 2 if h >= HEADS - config.shifted else 0
        pairs = [
            [(i + shift) // config.group == (j + shift) // config.group for j in range(t)] for i in range(t)
        ]
        return (np.array(pairs) | (np.arange(t) < config.group_sinks)) & np.tri(t, dtype=bool)

    return attended(model, x, seen)


@pytest.mark.sample(3)
@pytest.mark.parametrize("options", [{"group_sinks": 3}, {}, {"group_sinks": 2, "shifted_heads": 0}])
def test_shifted_groups(options):
    """Half of the heads shifted, with sinks and without, and none; groups that the length does not fill."""
    model = drawn("shifted_sparse", WIDTH, group=6, **ATTENTION, **options)
    x = tokens(TIME, WIDTH)
    want = by_row(lambda x: shifted(model, x), x)
    np.testing.assert_allclose(model(x)[0], want, atol=1e-5)
    np.testing.assert_allclose(in_two_calls(model, x)[0], want, atol=1e-5)


@pytest.mark.slow
def test_a_group_as_long_as_the_sequence_is_attention():
    """Without shifted heads, with the same parameters."""
    model = drawn("shifted_sparse", WIDTH, group=32, shifted_heads=0, heads=HEADS, kv_heads=KV)
    plain = drawn("attention", WIDTH, heads=HEADS, kv_heads=KV)
    x = tokens(TIME, WIDTH)
    np.testing.assert_allclose(model(x)[0], plain(x)[0], atol=1e-5)


def shortformer(model, x):
    """Subsequence by subsequence, the previous one before it, as the authors' code trains."""
    n, t, y = model.config.subsequence, len(x), []
    places = np.arange(2 * n)[:, None] * 10_000.0 ** (-(np.arange(WIDTH) // 2 * 2) / WIDTH)
    table = np.where(np.arange(WIDTH) % 2, np.cos(places), np.sin(places))
    for start in range(0, t, n):
        seen = x[max(0, start - n) : start + n]
        new = x[start : start + n]
        table_of = table[: len(seen)]
        q = heads(apply(model.query, new + table_of[-len(new) :]), HEADS)
        k, v = heads(apply(model.key, seen + table_of), KV), heads(apply(model.value, seen), KV)
        o = np.zeros_like(q)
        for h in range(HEADS):
            for i in range(len(new)):
                few = len(seen) - len(new) + i + 1
                a = k[:few, h // 2] @ q[i, h] / np.sqrt(q.shape[2])
                weights = np.exp(np.append(a, wide(model.sinks)[h]))
                o[i, h] = weights[:-1] / weights.sum() @ v[:few, h // 2]
        y.append(apply(model.output, o.reshape(len(new), -1)))
    return np.concatenate(y)


def whole(model, x):
    return model(x)


@pytest.mark.sample(2)
@pytest.mark.parametrize("run", [in_two_calls, whole])
def test_positions_infused(run):
    model = drawn("shortformer", WIDTH, subsequence=7, heads=HEADS, kv_heads=KV, bias=True, sink_logits=True)
    x = tokens(TIME, WIDTH)
    want = by_row(lambda x: shortformer(model, x), x)
    np.testing.assert_allclose(run(model, x)[0], want, atol=1e-5)


def transformer_xl(model, x):
    config, t, width = model.config, len(x), x.shape[1]
    q, k, v = (heads(apply(f, x), n) for f, n in ((model.query, HEADS), (model.key, KV), (model.value, KV)))
    content, place = wide(model.content_bias), wide(model.position_bias)
    o = np.zeros_like(q)
    for h in range(HEADS):
        for i in range(t):
            seen = range(max(0, i + 1 - (config.window or t)), i + 1)
            a = []
            for j in seen:
                distance = min(i - j, config.max_distance or t)
                angles = distance * 10_000.0 ** (-(np.arange(width) // 2 * 2) / width)
                p = np.where(np.arange(width) % 2, np.cos(angles), np.sin(angles))
                r = heads(apply(model.relative, p[None]), HEADS)[0, h]
                a.append((q[i, h] + content[h]) @ k[j, h // 2] + (q[i, h] + place[h]) @ r)
            o[i, h] = softmax(np.array(a) / np.sqrt(q.shape[2])) @ v[list(seen), h // 2]
    return apply(model.output, o.reshape(t, -1))


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "options, queries, run",
    [
        ({"window": 7, "max_distance": 4}, 128, in_two_calls),
        ({"window": 7, "max_distance": 4}, 10, whole),
        ({}, 10, in_two_calls),
    ],
)
def test_relative_positions_in_two_terms(options, queries, run, monkeypatch):
    """With a memory that one of two calls finds in part, and with all tokens for some queries at a time."""
    monkeypatch.setattr(xl_module, "QUERIES", queries)
    model = drawn("transformer_xl", WIDTH, heads=HEADS, kv_heads=KV, **options)
    x = tokens(TIME, WIDTH)
    want = by_row(lambda x: transformer_xl(model, x), x)
    np.testing.assert_allclose(run(model, x)[0], want, atol=1e-5)


def softplus_attention(model, x):
    config, t = model.config, len(x)
    q, k, v = (heads(apply(f, x), n) for f, n in ((model.query, HEADS), (model.key, KV), (model.value, KV)))
    o = np.zeros_like(q)
    for h in range(HEADS):
        for i in range(t):
            n, width = i + 1, q.shape[2]
            first = softplus(np.log(width) * np.log(n) / np.sqrt(width) * k[:n, h // 2] @ q[i, h])
            first /= first.sum()
            second = np.maximum(n * first - config.offset, 0) ** config.power
            weights = second / second.sum() if second.any() else first
            o[i, h] = weights @ v[:n, h // 2]
    return apply(model.output, o.reshape(t, -1))


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "options, queries, run",
    [
        ({"power": 5.0, "offset": 4.0}, 128, in_two_calls),
        ({}, 10, whole),
        ({}, 10, in_two_calls),
        ({"power": 1.0, "offset": 0.0}, 128, whole),
    ],
)
def test_softplus_and_reweighting(options, queries, run, monkeypatch):
    """With an offset above all weights of many rows, as published for some queries at a time, and not re-weighted."""
    monkeypatch.setattr(softplus_module, "QUERIES", queries)
    model = drawn("softplus_attention", WIDTH, **ATTENTION, **options)
    x = tokens(TIME, WIDTH)
    want = by_row(lambda x: softplus_attention(model, x), x)
    np.testing.assert_allclose(run(model, x)[0], want, atol=1e-5)


@pytest.mark.slow
def test_a_row_of_equal_weights_stays_one():
    """Tokens that are all alike: no weight is above the mean, and large powers of large weights do not overflow."""
    model = drawn("softplus_attention", WIDTH, **ATTENTION)
    x = jnp.broadcast_to(tokens(1, WIDTH), (2, TIME, WIDTH))
    v = by_row(lambda x: apply(model.value, x), x)
    want = np.repeat(heads(v[0], KV)[:, :, None], HEADS // KV, axis=2).reshape(TIME, -1)
    np.testing.assert_allclose(model(x)[0][0], apply(model.output, want), atol=1e-5)
    assert np.isfinite(model(1e4 * tokens(TIME, WIDTH))[0]).all()


def moba(model, x):
    config, t = model.config, len(x)
    block = np.arange(t) // config.block

    def seen(_, __, q, keys):
        found = np.zeros((t, t), bool)
        for i in range(t):
            means = {b: keys[block == b].mean(0) for b in range(block[i])}
            best = sorted(means, key=lambda b: -q[i] @ means[b])[: config.top_k - 1]
            for j in range(i + 1):
                found[i, j] = block[j] == block[i] or block[j] in best
        return found

    return attended(model, x, seen)


@pytest.mark.sample(2)
@pytest.mark.parametrize("queries", [4, 128])
def test_chosen_blocks(queries, monkeypatch):
    """By lists, and by masks in a cache, for some queries at a time."""
    monkeypatch.setattr(moba_module, "QUERIES", queries)
    model = drawn("moba", WIDTH, block=3, top_k=3, **ATTENTION)
    x = tokens(TIME, WIDTH)
    want = by_row(lambda x: moba(model, x), x)
    np.testing.assert_allclose(model(x)[0], want, atol=1e-5)
    np.testing.assert_allclose(in_two_calls(model, x)[0], want, atol=1e-5)
    ids = jnp.asarray([[1] * 15 + [2] * 11, [0] * 2 + [1] * 24])
    got, rows = np.asarray(model(x, segment_ids=ids)[0]), np.asarray(x, np.float64)
    for row, part in ((0, slice(0, 15)), (0, slice(15, 26)), (1, slice(2, 26))):
        np.testing.assert_allclose(got[row, part], moba(model, rows[row, part]), atol=1e-5)


@pytest.mark.slow
def test_every_block_chosen_is_attention():
    model = drawn("moba", WIDTH, block=3, top_k=9, heads=HEADS, kv_heads=KV)
    plain = drawn("attention", WIDTH, heads=HEADS, kv_heads=KV)
    x = tokens(TIME, WIDTH)
    np.testing.assert_allclose(model(x)[0], plain(x)[0], atol=1e-5)


def nsa(model, x):
    config, t = model.config, len(x)
    (q, k, v), shared = (
        (heads(apply(f, x), n) for f, n in ((model.query, HEADS), (model.key, KV), (model.value, KV))),
        HEADS // KV,
    )
    gates, scale = sigmoid(apply(model.gate, x)).reshape(t, HEADS, 3, 1), q.shape[2] ** -0.5
    y, size = np.zeros_like(q), config.block
    for g in range(KV):
        keys, values, group = k[:, g], v[:, g], range(g * shared, (g + 1) * shared)
        for i in range(t):
            own, whole = i // size, (i + 1) // size
            coarse = [keys[b * size : (b + 1) * size].mean(0) for b in range(whole)]
            coarse_values = [values[b * size : (b + 1) * size].mean(0) for b in range(whole)]
            weights = [softmax(scale * np.array(coarse) @ q[i, h]) if whole else np.zeros(0) for h in group]
            always = {0, own, max(0, own - 1)}
            best = sorted(set(range(whole)) - always, key=lambda b: -sum(w[b] for w in weights))
            chosen = always | set(best[: max(0, config.top_k - len(always))])
            picked = [j for j in range(i + 1) if j // size in chosen]
            recent = np.arange(max(0, i + 1 - config.window), i + 1)
            for h, weight in zip(group, weights, strict=True):
                if whole:
                    y[i, h] += gates[i, h, 0] * (weight @ coarse_values)
                for gate, seen in ((gates[i, h, 1], picked), (gates[i, h, 2], recent)):
                    y[i, h] += gate * (softmax(scale * keys[seen] @ q[i, h]) @ values[seen])
    return apply(model.output, y.reshape(t, -1))


@pytest.mark.slow
@pytest.mark.parametrize("queries", [4, 128])
def test_compressed_chosen_and_recent(queries, monkeypatch):
    """By lists, and by masks in a cache and in packed rows, for some queries at a time."""
    monkeypatch.setattr(nsa_module, "QUERIES", queries)
    model = drawn("nsa", WIDTH, block=3, top_k=4, window=5, **ATTENTION)
    x = tokens(TIME, WIDTH)
    want = by_row(lambda x: nsa(model, x), x)
    ids = jnp.asarray([[1] * 15 + [2] * 11, [0] * 2 + [1] * 24])
    run = jax.jit(lambda x: (model(x)[0], model(x, segment_ids=ids)[0]))
    got, packed = run(x)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(in_two_calls(model, x)[0], want, atol=1e-5)
    rows = np.asarray(x, np.float64)
    for row, part in ((0, slice(0, 15)), (0, slice(15, 26)), (1, slice(2, 26))):
        np.testing.assert_allclose(np.asarray(packed)[row, part], nsa(model, rows[row, part]), atol=1e-5)


def landmark(model, x):
    """Token by token: a softmax over the own block and the landmarks, and one in each block that these open."""
    size, t = model.config.block, len(x)
    q, k, v = (heads(apply(f, x), n) for f, n in ((model.query, HEADS), (model.key, KV), (model.value, KV)))
    y = np.zeros_like(q)
    for h in range(HEADS):
        g = h // (HEADS // KV)
        for i in range(t):
            a = k[:, g] @ q[i, h] / np.sqrt(q.shape[2])
            own = [j for j in range(i // size * size, i + 1) if j % size != size - 1]
            doors = [b * size + size - 1 for b in range(i // size)]
            weights = softmax(a[own + doors])
            y[i, h] = weights[: len(own)] @ v[own, g]
            for weight, door in zip(weights[len(own) :], doors, strict=True):
                inside = np.arange(door - size + 1, door)
                y[i, h] += weight * softmax(a[inside]) @ v[inside, g]
    return apply(model.output, y.reshape(t, -1))


@pytest.mark.sample(2)
@pytest.mark.parametrize("queries", [5, 128])
def test_landmarks(queries, monkeypatch):
    monkeypatch.setattr(landmark_module, "QUERIES", queries)
    model = drawn("landmark", WIDTH, block=4, **ATTENTION)
    x = tokens(TIME, WIDTH)
    want = by_row(lambda x: landmark(model, x), x)
    np.testing.assert_allclose(model(x)[0], want, atol=1e-5)
    np.testing.assert_allclose(in_two_calls(model, x)[0], want, atol=1e-5)
    ids = jnp.asarray([[1] * 15 + [2] * 11, [0] * 2 + [1] * 24])
    got, rows = np.asarray(model(x, segment_ids=ids)[0]), np.asarray(x, np.float64)
    for row, part in ((0, slice(0, 15)), (0, slice(15, 26)), (1, slice(2, 26))):
        np.testing.assert_allclose(got[row, part], landmark(model, rows[row, part]), atol=1e-5)
