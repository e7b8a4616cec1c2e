"""`attention` beyond the shared suite: every option in small blocks, what is seen, what is visited, what Segments tell."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.kernels.attention import (
    Logits,
    Mask,
    Tokens,
    attention,
    attention_with_lse,
    schedule,
)
from layers.kernels.attention.options import places, read_options
from layers.kernels.segments import Segments

B, T, H, G, KEY, VALUE = 2, 67, 4, 2, 5, 3
# Padding at both ends, between segments, and for longer than a window inside one.
SEGMENTS = np.array(
    [[0] * 3 + [1] * 20 + [0] * 2 + [1] * 9 + [5] * 30 + [0] * 3, [2] * 15 + [0] * 27 + [2] * 17 + [0] * 8],
    np.int32,
)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that a few dozen tokens cross many of them."""
    monkeypatch.setattr(schedule, "CPU_STEP_BYTES", 1 << 12)
    monkeypatch.setattr(schedule, "PAIR_BLOCKS", (16, 16))
    monkeypatch.setattr(schedule, "WINDOW_BLOCKS", (4, 8))
    monkeypatch.setattr(schedule, "LISTED_KEYS", 16)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def draw(t=T, s=T):
    return {"q": normal(0, B, t, H, KEY), "k": normal(1, B, s, G, KEY), "v": normal(2, B, s, G, VALUE)}


def block_lists(batch, heads, blocks=9, listed=3):
    """Lists with padding, repetitions and blocks that do not exist."""
    lists = np.random.default_rng(3).integers(-1, blocks + 1, (batch, heads, blocks, listed))
    return jnp.asarray(lists, jnp.int32)


def random_positions(batch, length, below):
    """Unsigned and narrow: their differences do not fit the type."""
    return jnp.asarray(np.random.default_rng(length).integers(0, below, (batch, length)), jnp.uint8)


BIAS = normal(4, B, H, T, T)
SLOPES = jnp.asarray([1.0, 0.5, 0.25, 0.1])
# Name: (queries, keys), whether lists of small blocks are used, options.
COMBINATIONS = {
    "bias_and_cap": ((T, T), False, {"causal": True, "logits": Logits(bias=BIAS[:1], logit_cap=1.5)}),
    "hiding_bias": (
        (T, T),
        False,
        {"logits": Logits(bias=jnp.where(BIAS[:, :1] > 0.3, -jnp.inf, BIAS[:, :1]))},
    ),
    "window_sinks_key_bias": (
        (T, T),
        True,
        {"mask": Mask(window=4, sink_tokens=3), "logits": Logits(bias=BIAS[:, :1, :1])},
    ),
    "wide_window_sinks": ((T, T), False, {"mask": Mask(window=18, sink_tokens=2)}),
    "window_sinks_segments_slopes": (
        (T, T),
        True,
        {
            "causal": True,
            "mask": Mask(window=6, sink_tokens=9),
            "logits": Logits(slopes=SLOPES),
            "segment_ids": SEGMENTS,
        },
    ),
    "window_prefix": (
        (T, T),
        False,
        {"causal": True, "mask": Mask(window=5, prefix_lengths=jnp.array([0, 40]))},
    ),
    "blocks_of_heads_bias_sinks": (
        (T, T),
        True,
        {
            "mask": Mask(block_indices=block_lists(B, H), block_size=8, sink_tokens=11),
            "logits": Logits(bias=BIAS),
        },
    ),
    "blocks_window_sink_logits": (
        (T, T),
        True,
        {
            "causal": True,
            "mask": Mask(block_indices=block_lists(1, 1), block_size=8, window=20),
            "logits": Logits(sink_logits=SLOPES),
        },
    ),
    "blocks_segments_prefix": (
        (T, T),
        False,
        {
            "causal": True,
            "mask": Mask(block_indices=block_lists(1, H), block_size=8, prefix_lengths=jnp.array([7])),
            "segment_ids": SEGMENTS,
        },
    ),
    "positions_lengths_blocks": (
        (T, 45),
        False,
        {
            "causal": True,
            "mask": Mask(block_indices=block_lists(B, H), block_size=8, sink_tokens=4),
            "logits": Logits(slopes=SLOPES),
            "tokens": Tokens(
                q_positions=random_positions(B, T, 90),
                kv_positions=random_positions(1, 45, 70),
                kv_lengths=jnp.array([0, 30]),
            ),
        },
    ),
    "cross_segments": (
        (T, 41),
        False,
        {
            "segment_ids": SEGMENTS,
            "tokens": Tokens(kv_segment_ids=jnp.asarray(SEGMENTS[:, 12:53])),
            "logits": Logits(logit_cap=2.0),
            "scale": 1.0,
        },
    ),
}
combinations = pytest.mark.parametrize("name", COMBINATIONS)


def options_of(name):
    options = COMBINATIONS[name][2]
    return {k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}


def close(got, want, tolerance, message):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.isfinite(got).all(), f"{message}: not finite"
    error = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)
    assert error <= tolerance, f"{message}: relative error {error:.2e}"


def results(arguments, options, impl):
    """Output, finite log-sum-exps, and gradients of a function of both with respect to every real array."""
    moving = {k: v for k, v in options.items() if k == "logits"}
    rest = {k: v for k, v in options.items() if k not in moving}

    def loss(moving):
        output, lse, _ = attention_with_lse(**moving, **rest, impl=impl)
        lse = jnp.where(lse == -jnp.inf, 0.0, lse)
        return (output * normal(8, *output.shape)).sum() + (lse * normal(9, *lse.shape)).sum(), (output, lse)

    (_, outputs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arguments | moving)
    named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(gradients)}
    return {"output": outputs[0], "lse": outputs[1], **named}


@pytest.mark.slow
@combinations
def test_blocked_options_match_the_reference(name, small_blocks):
    arguments = draw(*COMBINATIONS[name][0])
    options = options_of(name)
    want = results(arguments, options, "reference")
    got = results(arguments, options, "xla")
    assert got.keys() == want.keys()
    for key in want:
        close(got[key], want[key], 2e-5, f"{name}: {key}")


@combinations
def test_schedule_is_the_one_meant(name, small_blocks):
    lengths, lists, _ = COMBINATIONS[name]
    arguments = draw(*lengths)
    options = read_options(**arguments, **options_of(name))
    assert schedule.uses_lists(arguments["q"], arguments["k"], options) == lists


def test_bias_in_bfloat16():
    options = {"causal": True, "logits": Logits(bias=BIAS)}
    narrow = {k: v.astype(jnp.bfloat16) for k, v in draw().items()}
    got = attention(**narrow, **options)
    assert got.dtype == jnp.bfloat16
    want = attention(**{k: v.astype(jnp.float32) for k, v in narrow.items()}, **options, impl="reference")
    close(got.astype(jnp.float32), want, 1e-2, "bfloat16")


def seen_by_definition(t, causal, window, sinks, prefix, lists, size, segments):
    """The set of visible pairs, read off the documentation, one pair at a time."""
    positions, last, count = [], None, 0
    for segment in segments:
        if segment and segment != last:
            last, count = segment, 0
        positions.append(count)
        count += bool(segment)
    seen = np.zeros((t, t), bool)
    for i in range(t):
        for j in range(t):
            p, r = positions[i], positions[j]
            near = window is None or (p - r < window if causal else abs(p - r) <= window)
            listed = lists is None or r // size in lists[p // size]
            base = ((near and listed) or r < sinks) and (r <= p or not causal)
            both = p < prefix and r < prefix
            seen[i, j] = (base or both) and segments[i] == segments[j] != 0
    return seen


@pytest.mark.sample(4)
@pytest.mark.parametrize("impl", ["reference", "xla"])
@pytest.mark.parametrize(
    "causal, window, sinks, prefix, listed",
    [(True, 3, 2, 0, False), (False, 3, 2, 0, False), (True, 5, 0, 9, False), (False, None, 1, 0, True)],
)
def test_what_is_seen(impl, causal, window, sinks, prefix, listed, small_blocks):
    """With one-hot values the outputs are the probabilities, and so are the derivatives: zero exactly where hidden."""
    t, size = 30, 4
    segments = np.array([0] * 2 + [3] * 9 + [0] + [3] * 4 + [1] * 11 + [0] * 3)
    lists = [[0, 3], [1, 1], [-1, 2], [-1, -1], *[[0, 0]] * 4] if listed else None
    seen = seen_by_definition(t, causal, window, sinks, prefix, lists, size, segments)
    mask = Mask(window=window, sink_tokens=sinks)
    if prefix:
        mask = dataclasses.replace(mask, prefix_lengths=jnp.array([prefix]))
    if listed:
        indices = jnp.asarray(lists, jnp.int32)[None, None]
        mask = dataclasses.replace(mask, block_indices=indices, block_size=size)
    options = {"causal": causal, "mask": mask, "impl": impl}
    options["segment_ids"] = jnp.asarray(segments[None], jnp.int32)
    q, k = normal(0, 1, t, 1, 4), normal(1, 1, t, 1, 4)
    run = functools.partial(attention, q, v=jnp.eye(t)[None, :, None], **options)
    probabilities = run(k)[0, :, 0]
    assert np.array_equal(np.asarray(probabilities) != 0, seen)
    assert np.allclose(probabilities.sum(1), seen.any(1), atol=1e-6)
    slope = jax.jit(jax.jacrev(lambda k: (run(k)[0, :, 0] * normal(2, t, t)).sum(1)))(k)[:, 0, :, 0]
    several = seen & (seen.sum(1, keepdims=True) > 1)
    assert np.array_equal((np.asarray(slope) != 0).any(-1), several)


@pytest.mark.slow
def test_blocks_under_vmap_and_shard_map(small_blocks):
    """Steps that only the data can skip, per row; slopes that all devices share, with their gradients."""
    q, k, v = (normal(i, 8, 40, heads, 3) for i, heads in enumerate((H, G, G)))
    ids = np.zeros((8, 40), np.int32)
    for row in range(8):
        ids[row, row : 12 + row], ids[row, 15 + row : 35] = 1, 2

    def run(slopes, *arguments):
        def loss(slopes, q, k, v):
            output = attention(q, k, v, segment_ids=arguments[3], logits=Logits(slopes=slopes))
            return (output**2).sum(), output

        (dslopes, *gradients), output = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(
            slopes, *arguments[:3]
        )
        return dslopes, (output, *gradients)

    arguments = (q, k, v, jnp.asarray(ids))
    want = jax.jit(run)(SLOPES, *arguments)
    pairs = jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[1:]), arguments)
    dslopes, mapped = jax.jit(jax.vmap(run, in_axes=(None, 0, 0, 0, 0)))(SLOPES, *pairs)
    got = dslopes.sum(0), jax.tree.map(lambda x: x.reshape(8, *x.shape[2:]), mapped)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, same = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(same, *[rows] * 4), out_specs=(same, rows))
    for result in (got, jax.jit(sharded)(SLOPES, *arguments)):
        for g, w in zip(jax.tree.leaves(result), jax.tree.leaves(want), strict=True):
            close(g, w, 2e-5, "vmap or shard_map")


@pytest.mark.slow
def test_second_derivatives(small_blocks):
    arguments, options = draw(20, 20), {"causal": True}

    def twice(arguments, impl):
        first = jax.grad(lambda a: (attention(**a, **options, impl=impl) ** 2).sum())
        return jax.grad(lambda a: sum((g**2).sum() for g in jax.tree.leaves(first(a))))(arguments)

    got, want = (jax.jit(twice, static_argnums=1)(arguments, impl) for impl in ("xla", "reference"))
    for name in want:
        close(got[name], want[name], 2e-4, name)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "options", [{"causal": True}, {"causal": True, "mask": Mask(window=64, sink_tokens=4)}]
)
def test_memory_grows_linearly(options):
    def bytes_for(t):
        shapes = [jax.ShapeDtypeStruct((1, t, 2, 8), jnp.float32)] * 3
        step = jax.jit(jax.grad(lambda q, k, v: attention(q, k, v, **options).sum(), argnums=(0, 1, 2)))
        return step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    short, long = bytes_for(4096), bytes_for(16384)
    assert long < 4.5 * short
    # Queries, keys, values, outputs, their float32 sums and gradients, but no 16384 x 16384 logits.
    assert long < 40 * 4 * 16384 * 2 * 8


def test_only_blocks_that_may_be_seen_are_visited(small_blocks):
    arguments = draw(64, 64)
    q, k = arguments["q"], arguments["k"]

    def visits(**options):
        options = read_options(**arguments, **options)
        steps = schedule.schedule(q, k, options, places(q, k, options)).steps
        return int((steps.blocks >= 0).sum())

    assert visits() == 16
    assert visits(causal=True) == 10
    assert visits(mask=Mask(window=16)) == 10
    assert visits(mask=Mask(window=16, sink_tokens=1)) == 10 + 2
    assert visits(causal=True, mask=Mask(window=4)) == 16 + 15
    assert visits(mask=Mask(block_indices=block_lists(1, 1, 8) * 0, block_size=8)) == 8


@pytest.mark.sample(4)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_what_segments_know_changes_no_number(causal, packed, small_blocks):
    """Padding at the ends, in rows of one segment or of three, told and not told; what padding holds reaches nothing."""
    ids = np.zeros((B, T), np.int32)
    ids[0, :40] = np.repeat([1, 3, 1], [20, 13, 7]) if packed else 1
    ids[1, :T] = 2
    known = Segments.of(jnp.asarray(ids), padding="end", packed=packed)
    arguments = draw()
    for mask in (None, Mask(window=5, sink_tokens=2 * causal)):

        def loss(arguments, segment_ids, mask=mask):
            output = attention(**arguments, causal=causal, mask=mask, segment_ids=segment_ids)
            return (output * normal(8, *output.shape)).sum(), output

        run = jax.jit(jax.grad(loss, has_aux=True))
        want = run(arguments, jnp.asarray(ids))
        assert (want[1][0, 40:] == 0).all()
        for got, expected in zip(jax.tree.leaves(run(arguments, known)), jax.tree.leaves(want), strict=True):
            close(got, expected, 1e-6, f"{mask}")
