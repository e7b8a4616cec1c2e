"""The attention mixer against its equation in NumPy, and its cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.mixers.attention.attention import Attention
from layers.parts.attention_config import AttentionConfig

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
    turn = np.exp(1j * np.arange(time)[:, None] * config.position.base ** (-np.arange(0, size, 2) / size))

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


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "options",
    [
        {"heads": 2},
        {"heads": 4, "kv_heads": 2, "causal": False},
        {"heads": 4, "kv_heads": 1, "window": 3},
        {
            "heads": 1,
            "head_dim": 4,
            "causal": False,
            "window": 2,
            "position": {"name": "rope", "base": 100.0},
        },
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


@pytest.mark.slow
def test_tokens_beyond_the_cache_are_nan_and_the_others_right():
    model = make(heads=2)
    want, _ = model(inputs())
    got, _ = model(inputs(), model.init_state(2, max_length=7))
    np.testing.assert_allclose(got[:, :7], want[:, :7], atol=1e-6)
    assert np.isnan(got[:, 7:]).all()


@pytest.mark.slow
def test_a_window_keeps_a_cache_of_its_size_for_any_length():
    model = make(heads=2, window=4)
    state = model.init_state(2)
    assert state.carried.numbers.shape[1] == 4
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
        ({"heads": 8}, "head_dim=1: .*even head size"),
        ({"heads": 2, "window": 0}, "window=0"),
        ({"heads": 2, "position": "learnt"}, "unknown position 'learnt'"),
        ({"heads": 2, "position": {"name": "rope", "bass": 10.0}}, "did you mean 'base'"),
        ({"heads": 2, "position": {"name": "rope", "factor": 2.0}}, "factor=2.0 with scaling='none'"),
        (
            {"heads": 2, "position": {"name": "rope", "scaling": "yarn", "factor": 2.0}},
            "yarn needs the length",
        ),
        ({"heads": 2, "sink_tokens": 2}, "sink_tokens=2 with window=None"),
        ({"heads": 2, "logit_cap": -1.0}, "logit_cap=-1.0"),
        ({"heads": 2, "window": 2, "sink_distance": "cache"}, "'cache' needs sink_tokens"),
        ({"heads": 2, "sink_distance": "slot"}, "sink_distance='slot'"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionConfig(width=WIDTH, **options)


def biased(model, x, add, seen, sink=None):
    """Softmax attention of full heads in float64 with `add` (h, t, t) on the logits and a mask `seen`."""
    x, size, heads = np.asarray(x, np.float64), model.config.size, model.config.heads
    q, k, v, out = (
        np.asarray(getattr(model, n).kernel[...], np.float64) for n in ("query", "key", "value", "output")
    )
    scale = 1 / np.sqrt(size) if model.config.scale is None else model.config.scale
    rows = []
    for row in x:
        parts = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            logits = scale * (row @ q[:, part]) @ (row @ k[:, part]).T
            if model.config.logit_cap is not None:
                logits = model.config.logit_cap * np.tanh(logits / model.config.logit_cap)
            weights = np.exp(logits + add[head]) * seen
            total = weights.sum(1, keepdims=True) + (0 if sink is None else np.exp(sink[head]))
            parts.append(weights / total @ (row @ v[:, part]))
        rows.append(np.concatenate(parts, 1) @ out)
    return np.stack(rows)


def test_window_with_sinks_sink_logits_cap_and_slopes_against_the_equation():
    model = make(
        heads=2, window=4, sink_tokens=2, sink_logits=True, logit_cap=0.5, position="alibi", scale=0.9
    )
    model.sinks[...] = jnp.array([0.3, -1.0])
    i, j = np.indices((TIME, TIME))
    add = -np.array([2.0**-4, 2.0**-8])[:, None, None] * abs(i - j)
    seen = (j <= i) & ((i - j < 4) | (j < 2))
    want = biased(model, inputs(), add, seen, sink=[0.3, -1.0])
    np.testing.assert_allclose(model(inputs())[0], want, atol=2e-6)


@pytest.mark.sample(4)
@pytest.mark.parametrize("position", ["t5", "fire"])
@pytest.mark.parametrize("time", [11, 150])
def test_biases_are_added_block_by_block(position, time):
    """150 queries are two blocks."""
    model = make(heads=2, position=position)
    i, j = np.indices((time, time))
    at = jnp.arange(time)[None]
    add = np.asarray(model.position.bias(at, at)[0], np.float64)
    assert add.std() > 0.01
    want = biased(model, inputs(time), add, j <= i)
    np.testing.assert_allclose(model(inputs(time))[0], want, atol=5e-6)


def test_a_bias_by_blocks_in_packed_rows_and_its_gradient():
    model = make(heads=2, position="t5")
    x, ids = inputs(150), jnp.where(jnp.arange(150) < 75, 1, 2)[None].repeat(2, 0)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, x, ids):
        y, _ = nnx.merge(graph, params, rest, copy=True)(x, segment_ids=ids)
        return jnp.sum(y * x), y

    gradients = jax.jit(jax.grad(loss, has_aux=True))
    gradient, packed = gradients(params, x, ids)
    pieces = [gradients(params, part, None) for part in (x[:, :75], x[:, 75:])]
    np.testing.assert_allclose(packed, jnp.concatenate([y for _, y in pieces], 1), atol=2e-6)
    for whole, one, two in zip(*map(jax.tree.leaves, (gradient, pieces[0][0], pieces[1][0])), strict=True):
        np.testing.assert_allclose(whole, one + two, atol=2e-4)


def test_sinks_of_a_segment_stay_in_the_cache():
    model = make(heads=2, window=3, sink_tokens=2)
    state = model.init_state(2)
    assert state.carried.numbers.shape[1] == 5
    ids = jnp.where(jnp.arange(30) < 13, 1, 2)[None].repeat(2, 0)
    run = nnx.jit(lambda model, x, state, ids: model(x, state, segment_ids=ids))
    want, _ = run(model, inputs(30), None, ids)
    outputs = []
    for start in range(0, 30, 5):
        cut = slice(start, start + 5)
        y, state = run(model, inputs(30)[:, cut], state, ids[:, cut])
        outputs.append(y)
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), want, atol=1e-6)
    np.testing.assert_array_equal(state.carried.positions[:, :2], [[0, 1]] * 2)


def streaming(model, x):
    """One row, one head: rotations by the distance itself."""
    config, x = model.config, np.asarray(x, np.float64)
    q, k, v = (x @ np.asarray(getattr(model, n).kernel[...], np.float64) for n in ("query", "key", "value"))
    frequency = 10_000.0 ** (-np.arange(0, 8, 2) / 8)
    o = np.zeros_like(v)
    for i in range(len(x)):
        kept = [j for j in range(i + 1) if i - j < config.window or j < config.sink_tokens]
        logits = []
        for j in kept:
            last_slot = config.sink_tokens + config.window - 1
            far = config.window if config.sink_distance == "window" else min(i, last_slot) - j
            distance = i - j if i - j < config.window else far
            turned = (k[j, :4] + 1j * k[j, 4:]) * np.exp(-1j * distance * frequency)
            logits.append(((q[i, :4] + 1j * q[i, 4:]).conj() @ turned).real / np.sqrt(8))
        weights = np.exp(logits - np.max(logits))
        o[i] = weights / weights.sum() @ v[kept]
    return o @ np.asarray(model.output.kernel[...], np.float64)


@pytest.mark.slow
@pytest.mark.parametrize("distance", ["cache", "window"])
def test_sinks_at_the_distance_of_their_slots_or_of_the_window(distance):
    model = make(heads=1, window=4, sink_tokens=2, sink_distance=distance)
    y, _ = model(inputs(14))
    for row, got in zip(inputs(14), y, strict=True):
        np.testing.assert_allclose(got, streaming(model, row), atol=2e-6)


@pytest.mark.slow
def test_what_dropped_out_of_a_stream_changes_nothing():
    """A token's output depends on the sinks and the window, wherever in the stream it is."""
    model = make(heads=2, window=4, sink_tokens=2, sink_distance="cache")
    x = inputs(30)
    long, _ = model(x)
    short, _ = model(jnp.concatenate([x[:, :2], x[:, -4:]], axis=1))
    np.testing.assert_allclose(long[:, -1], short[:, -1], atol=2e-6)
