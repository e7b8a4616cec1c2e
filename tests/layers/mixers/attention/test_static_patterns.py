"""Attention with patterns that data do not decide against NumPy, pair by pair: blocks at fixed distances and places, core tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.mixers.attention import core_context as core_context_module
from tests.layers.mixers.literal import apply, by_row, drawn, heads, in_two_calls, softmax, tokens

WIDTH, HEADS, KV, TIME = 8, 4, 2, 26
ATTENTION = {"heads": HEADS, "kv_heads": KV, "position": "none"}
IDS = jnp.asarray([[1] * 15 + [2] * 11, [0] * 2 + [1] * 24])
PARTS = (0, slice(0, 15)), (0, slice(15, 26)), (1, slice(2, 26))


def projected(model, x):
    return (heads(apply(f, x), n) for f, n in ((model.query, HEADS), (model.key, KV), (model.value, KV)))


def seen_by_powers(config, row, place):
    return row - place in (1, 2, 4, 8, 16)


def seen_by_stride(config, row, place):
    return place % config.stride == 0


def blocks(rule, model, x):
    """Token by token, over the blocks that the rule, the local ones and the first ones give."""
    config, t = model.config, len(x)
    q, k, v = projected(model, x)
    y = np.zeros_like(q)
    for i in range(t):
        row, seen = i // config.block, []
        for j in range(i + 1):
            place = j // config.block
            local = row - place < config.local_blocks
            if local or place < config.sink_blocks or rule(config, row, place):
                seen.append(j)
        for h in range(HEADS):
            g = h // (HEADS // KV)
            y[i, h] = softmax(k[seen, g] @ q[i, h] / np.sqrt(q.shape[2])) @ v[seen, g]
    return apply(model.output, y.reshape(t, -1))


of_blocks = pytest.mark.parametrize(
    "name, rule, options",
    [
        ("power_attention", seen_by_powers, {"block": 2, "sink_blocks": 1}),
        ("power_attention", seen_by_powers, {"block": 1, "local_blocks": 4}),
        ("strided_attention", seen_by_stride, {"block": 2, "local_blocks": 2, "stride": 3}),
        ("strided_attention", seen_by_stride, {"block": 3, "sink_blocks": 2, "stride": 4}),
    ],
)


@pytest.mark.sample(4)
@of_blocks
def test_blocks_of_fixed_patterns_in_two_calls(name, rule, options):
    model = drawn(name, WIDTH, **ATTENTION, **options)
    x = tokens(TIME, WIDTH)
    want = by_row(lambda x: blocks(rule, model, x), x)
    np.testing.assert_allclose(in_two_calls(model, x)[0], want, atol=1e-5)


@pytest.mark.slow
@of_blocks
def test_blocks_of_fixed_patterns_in_rows(name, rule, options):
    """In whole rows, and in packed ones with padding in front."""
    model = drawn(name, WIDTH, **ATTENTION, **options)
    x = tokens(TIME, WIDTH)
    whole, packed = jax.jit(lambda x: (model(x)[0], model(x, segment_ids=IDS)[0]))(x)
    np.testing.assert_allclose(whole, by_row(lambda x: blocks(rule, model, x), x), atol=1e-5)
    for row, part in PARTS:
        want = blocks(rule, model, np.asarray(x[row, part], np.float64))
        np.testing.assert_allclose(packed[row, part], want, atol=1e-5)


def test_powers_reach_every_earlier_block_after_a_layer_per_doubling():
    """The product over ceil(log2 n) layers of the masks of n blocks has no zero below the diagonal."""
    count = 21
    lists = np.asarray(
        drawn("power_attention", WIDTH, block=4, **ATTENTION).mask(4 * count).block_indices[0, 0]
    )
    seen = np.zeros((count, count), int)
    for row, listed in enumerate(lists):
        seen[row, listed[listed >= 0]] = 1
    depth = int(np.ceil(np.log2(count)))
    assert np.array_equal(np.linalg.matrix_power(seen, depth) > 0, np.tri(count, dtype=bool))
    assert not np.array_equal(np.linalg.matrix_power(seen, depth - 2) > 0, np.tri(count, dtype=bool))


def core_context(model, x):
    """Token by token: one softmax over the cores of the first groups and over the tokens behind these."""
    group, near, t = model.config.group, model.config.near, len(x)
    q, k, v = projected(model, x)
    y, scale = np.zeros_like(q), q.shape[2] ** -0.5
    for h in range(HEADS):
        keys, values = k[:, h // (HEADS // KV)], v[:, h // (HEADS // KV)]
        cores, of_cores = [], []
        for start in range(0, t - group + 1, group):
            own = slice(start, start + group)
            weights = softmax(scale * keys[own] @ q[start + group - 1, h])
            cores.append(weights @ keys[own])
            of_cores.append(weights @ values[own])
        for i in range(t):
            count = max(0, (i + 1 - near) // group)
            own = slice(count * group, i + 1)
            seen = np.array(cores[:count] + list(keys[own]))
            y[i, h] = softmax(scale * seen @ q[i, h]) @ np.array(of_cores[:count] + list(values[own]))
    return apply(model.output, y.reshape(t, -1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "queries, options",
    [(128, {"group": 3, "near": 4}), (5, {"group": 4, "near": 2}), (128, {"group": 5, "near": 24})],
)
def test_core_tokens(queries, options, monkeypatch):
    """In whole rows, in two calls and in packed rows with padding in front, all and some queries at a time."""
    monkeypatch.setattr(core_context_module, "QUERIES", queries)
    model = drawn("core_context", WIDTH, **ATTENTION, **options)
    x = tokens(TIME, WIDTH)
    run = jax.jit(lambda x: (model(x)[0], model(x, segment_ids=IDS)[0]))
    whole, packed = run(x)
    want = by_row(lambda x: core_context(model, x), x)
    np.testing.assert_allclose(whole, want, atol=1e-5)
    np.testing.assert_allclose(in_two_calls(model, x)[0], want, atol=1e-5)
    for row, part in PARTS:
        want = core_context(model, np.asarray(x[row, part], np.float64))
        np.testing.assert_allclose(packed[row, part], want, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, options",
    [
        ("power_attention", {"block": 4, "local_blocks": 7}),
        ("strided_attention", {"block": 4, "stride": 1}),
        ("core_context", {"group": 1, "near": 3}),
    ],
)
def test_patterns_that_hide_nothing_are_attention(name, options):
    """Cores of one token each, and lists of all blocks, with rotary positions and the same parameters."""
    model = drawn(name, WIDTH, heads=HEADS, kv_heads=KV, **options)
    plain = drawn("attention", WIDTH, heads=HEADS, kv_heads=KV)
    x = tokens(TIME, WIDTH)
    np.testing.assert_allclose(model(x)[0], plain(x)[0], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["power_attention", "strided_attention"])
def test_patterns_of_blocks_take_biases_of_positions(name):
    """Far tokens of ALiBi's steepest head are as good as hidden, and those of the others are not."""
    options = {"block": 4, "local_blocks": 7, "position": "alibi"}
    model, plain = (
        drawn(n, WIDTH, heads=HEADS, **o) for n, o in ((name, options), ("attention", {"position": "alibi"}))
    )
    x = tokens(TIME, WIDTH)
    np.testing.assert_allclose(model(x)[0], plain(x)[0], atol=1e-5)
