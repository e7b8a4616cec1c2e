"""`attention` beyond the shared suite: every option in small blocks, what is seen, caches, composition, cuDNN."""

import dataclasses
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.kernels.attention import (
    Logits,
    Mask,
    Piece,
    Tokens,
    attention,
    attention_with_lse,
    compose,
    cudnn,
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
        output, lse = attention_with_lse(**moving, **rest, impl=impl)
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


@pytest.mark.parametrize("impl", ["reference", "xla"])
def test_rows_that_see_nothing_are_zero_and_so_are_their_gradients(impl):
    arguments = draw(5, 7)
    lengths = jnp.array([0, 7])

    def loss(arguments, sink):
        piece = attention_with_lse(
            **arguments, tokens=Tokens(kv_lengths=lengths), logits=Logits(sink_logits=sink), impl=impl
        )
        return (piece.output[0] ** 2 + piece.output[0]).sum(), piece

    gradients, piece = jax.jit(jax.grad(loss, has_aux=True))(arguments, None)
    assert (piece.output[0] == 0).all()
    assert (piece.lse[0] == -jnp.inf).all()
    assert np.isfinite(piece.lse[1]).all()
    assert all((g == 0).all() for g in jax.tree.leaves(gradients))
    gradients, piece = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(arguments, SLOPES)
    assert (piece.output[0] == 0).all()
    close(piece.lse[0], jnp.broadcast_to(SLOPES, (5, H)), 1e-6, "the sink alone")
    assert all((g == 0).all() for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    "options",
    [{}, {"mask": Mask(window=5, sink_tokens=2)}, {"logits": Logits(slopes=SLOPES, logit_cap=3.0)}],
)
def test_cached_decoding_equals_prefill(options):
    """Rows of different lengths in one cache, some tokens at once and then one by one."""
    t, size = 19, 24
    arguments = draw(t, t)
    want = attention(**arguments, causal=True, **options)
    start = jnp.array([0, 4])
    row = jnp.arange(B)[:, None]

    @functools.partial(jax.jit, static_argnums=1)
    def step(state, count):
        lengths, cache = state
        where = lengths[:, None] + jnp.arange(count)[None]
        new = {name: arguments[name][row, where] for name in ("q", "k", "v")}
        cache = {name: cache[name].at[row, where].set(new[name]) for name in ("k", "v")}
        out = attention(
            new["q"],
            **cache,
            causal=True,
            tokens=Tokens(
                q_positions=where,
                kv_positions=jnp.arange(size)[None],
                kv_lengths=lengths + count,
            ),
            **options,
        )
        return (lengths + count, cache), out, where

    seen = jnp.arange(size)[None, :, None, None] < start[:, None, None, None]
    # What a cache holds beyond a row's length must not matter.
    cache = {
        name: jnp.where(seen, jnp.pad(arguments[name], ((0, 0), (0, size - t), (0, 0), (0, 0))), 1e6)
        for name in ("k", "v")
    }
    state = (start, cache)
    for count in (6, 1, 1, 2, 1):
        state, out, where = step(state, count)
        close(out, want[row, where], 2e-5, f"{count} tokens at {where[:, 0]}")


def test_pieces_compose_to_one_softmax():
    arguments, options = draw(), {"causal": True, "mask": Mask(window=30)}
    cuts = (0, 11, 40, T)
    weights = normal(5, B, T, H, VALUE), normal(6, B, T, H)

    def piece(arguments, low, high, sink):
        return attention_with_lse(
            arguments["q"],
            arguments["k"][:, low:high],
            arguments["v"][:, low:high],
            tokens=Tokens(q_positions=jnp.arange(T)[None], kv_positions=jnp.arange(low, high)[None]),
            logits=Logits(sink_logits=SLOPES) if sink else None,
            **options,
        )

    def whole(arguments):
        return attention_with_lse(**arguments, logits=Logits(sink_logits=SLOPES), **options)

    def joined(arguments, order):
        pieces = [piece(arguments, *bounds, sink=bounds[0] == 11) for bounds in itertools.pairwise(cuts)]
        identity = Piece(jnp.zeros_like(pieces[0].output), jnp.full_like(pieces[0].lse, -jnp.inf))
        left = functools.reduce(compose, [identity, *pieces])
        right = functools.reduce(lambda later, first: compose(first, later), pieces[::-1])
        return (left, right)[order]

    def loss(run, arguments, *order):
        output, lse = run(arguments, *order)
        return (output * weights[0]).sum() + (lse * weights[1]).sum(), (output, lse)

    want = jax.jit(jax.grad(functools.partial(loss, whole), has_aux=True))(arguments)
    for order in (0, 1):
        got = jax.jit(jax.grad(functools.partial(loss, joined), has_aux=True), static_argnums=1)(
            arguments, order
        )
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            close(g, w, 2e-5, f"order {order}")


@pytest.mark.parametrize(
    "options, theirs",
    [
        ({}, {}),
        ({"causal": True, "scale": 0.3}, {"is_causal": True, "scale": 0.3}),
        ({"causal": True, "mask": Mask(window=5)}, {"is_causal": True, "local_window_size": (4, 0)}),
        ({"mask": Mask(window=5)}, {"local_window_size": (5, 5)}),
        ({"logits": Logits(bias=BIAS)}, {"bias": BIAS}),
        (
            {"tokens": Tokens(kv_lengths=jnp.array([3, 60]))},
            {"key_value_seq_lengths": jnp.array([3, 60], jnp.int32)},
        ),
    ],
)
def test_agrees_with_jax_nn(options, theirs):
    arguments = draw() | {"v": normal(2, B, T, G, KEY)}
    want = jax.nn.dot_product_attention(*arguments.values(), **theirs, implementation="xla")
    close(attention(**arguments, **options), want, 2e-5, "output")


def test_grouped_heads_read_neighbouring_heads():
    """Query head i reads head i // (h / g): repeating each head gives the same, tiling them does not."""
    arguments = draw()
    repeated = {"q": arguments["q"]} | {n: jnp.repeat(arguments[n], H // G, axis=2) for n in ("k", "v")}
    tiled = {"q": arguments["q"]} | {n: jnp.tile(arguments[n], (1, 1, H // G, 1)) for n in ("k", "v")}
    got = attention(**arguments, causal=True)
    close(got, attention(**repeated, causal=True), 1e-6, "repeated")
    assert not np.allclose(got, attention(**tiled, causal=True), atol=0.1)


def test_slopes_are_a_bias_of_distances():
    arguments = draw()
    distance = jnp.abs(jnp.arange(T)[:, None] - jnp.arange(T)[None]).astype(jnp.float32)
    bias = -SLOPES[None, :, None, None] * distance[None, None]
    got = attention(**arguments, logits=Logits(slopes=SLOPES))
    close(got, attention(**arguments, logits=Logits(bias=bias)), 1e-6, "slopes")


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


def test_second_derivatives(small_blocks):
    arguments, options = draw(20, 20), {"causal": True}

    def twice(arguments, impl):
        first = jax.grad(lambda a: (attention(**a, **options, impl=impl) ** 2).sum())
        return jax.grad(lambda a: sum((g**2).sum() for g in jax.tree.leaves(first(a))))(arguments)

    got, want = (jax.jit(twice, static_argnums=1)(arguments, impl) for impl in ("xla", "reference"))
    for name in want:
        close(got[name], want[name], 2e-4, name)


def test_large_logits_pick_one_key():
    q = k = jnp.eye(8)[None, :, None] * 1e4
    output, lse = attention_with_lse(q, k, jnp.eye(8)[None, :, None], scale=1.0)
    assert np.array_equal(output[0, :, 0], np.eye(8))
    assert np.allclose(lse, 1e8)


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


@pytest.mark.parametrize(
    "options, error",
    [
        ({"causal": True, "mask": Mask(window=0)}, "window=0; expected at least 1"),
        ({"mask": Mask(window=-1)}, "window=-1; expected at least 0"),
        ({"mask": Mask(sink_tokens=2)}, "sink_tokens=2 changes nothing"),
        ({"mask": Mask(prefix_lengths=jnp.array([1, 2]))}, "prefix_lengths is for causal=True"),
        ({"mask": Mask(block_size=4)}, "block_indices and block_size go together"),
        (
            {"mask": Mask(block_indices=block_lists(1, 1, 2), block_size=4)},
            "block_indices lists 2 blocks of 4",
        ),
        ({"logits": Logits(logit_cap=0.0)}, "logit_cap=0.0; expected a positive number"),
        (
            {"tokens": Tokens(q_positions=jnp.zeros((1, T), jnp.int32))},
            "q_positions and kv_positions go together",
        ),
        (
            {"tokens": Tokens(kv_segment_ids=jnp.ones((B, T), jnp.int32))},
            "kv_segment_ids needs segment_ids",
        ),
        ({"logits": Logits(slopes=SLOPES[:2])}, "slopes has shape"),
        ({"tokens": Tokens(kv_lengths=jnp.ones(B))}, "kv_lengths has dtype float32"),
        ({"scale": jnp.ones(())}, "scale is .*; expected a number known before tracing"),
        ({"mask": jnp.ones((B, 1, T, T), bool)}, "mask is .*; expected a Mask or None"),
        ({"windw": 3}, "windw"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, error):
    for function in (attention, attention_with_lse):
        with pytest.raises((ValueError, TypeError), match=error):
            function(**draw(), **options)


def test_a_window_is_known_before_tracing():
    for window in (2.0, jnp.ones((), jnp.int32)):
        with pytest.raises(TypeError, match="window is .*; expected an int known before tracing"):
            attention(**draw(), mask=Mask(window=window))


needs_positions = {
    "causal": {"causal": True},
    "window": {"mask": Mask(window=2)},
    "slopes": {"logits": Logits(slopes=SLOPES)},
}


@pytest.mark.parametrize("name", needs_positions)
def test_different_lengths_need_positions(name):
    with pytest.raises(ValueError, match="need q_positions"):
        attention(**draw(3, 5), **needs_positions[name])
    with pytest.raises(ValueError, match="give kv_segment_ids"):
        attention(**draw(3, 5), segment_ids=jnp.ones((B, 3), jnp.int32))


def test_heads_must_divide():
    with pytest.raises(ValueError, match="q has 3 heads and k has 2"):
        attention(**(draw() | {"q": normal(0, B, T, 3, KEY)}))


def test_no_keys_and_no_queries():
    output, lse = attention_with_lse(**draw(4, 0))
    assert output.shape == (B, 4, H, VALUE)
    assert (output == 0).all()
    assert (lse == -jnp.inf).all()
    assert attention(**draw(0, 4)).shape == (B, 0, H, VALUE)


def cudnn_refusal(monkeypatch, options, dtype=jnp.bfloat16, sizes=(64, 64), capability="9.0", length=8):
    client = types.SimpleNamespace(platform_version="PJRT C API\ncuda 13000")
    device = types.SimpleNamespace(
        platform="gpu", client=client, compute_capability=capability, device_kind="NVIDIA"
    )
    monkeypatch.setattr(cudnn, "_device", lambda: device)
    q, k = (jax.ShapeDtypeStruct((1, length, 2, sizes[0]), dtype),) * 2
    v = jax.ShapeDtypeStruct((1, length, 2, sizes[1]), dtype)
    return cudnn.refuses(q, k, v, read_options(q, k, v, **options))


def test_cudnn_takes_only_what_it_computes_as_defined(monkeypatch):
    refusal = functools.partial(cudnn_refusal, monkeypatch)
    ids = jnp.ones((1, 8), jnp.int32)
    whole = Segments.of(ids, padding="end", packed=False)
    for options in ({}, {"causal": True}, {"causal": True, "mask": Mask(window=4), "scale": 1.0}):
        assert refusal(options) is None
    for options in ({}, {"causal": True}, {"causal": True, "mask": Mask(window=4)}):
        assert refusal({**options, "segment_ids": whole}) is None
        for less in (ids, Segments.of(ids, padding="end"), Segments.of(ids, packed=False)):
            assert "not segment_ids of which less is known" in refusal({**options, "segment_ids": less})
    assert "window is causal" in refusal({"mask": Mask(window=4)})
    assert "not sink_tokens" in refusal({"mask": Mask(window=4, sink_tokens=1)})
    assert "not kv_lengths" in refusal({"tokens": Tokens(kv_lengths=jnp.ones(1, jnp.int32))})
    assert "not kv_segment_ids" in refusal({"segment_ids": whole, "tokens": Tokens(kv_segment_ids=ids)})
    assert "not logit_cap" in refusal({"logits": Logits(logit_cap=5.0)})
    assert "float32" in refusal({}, dtype=jnp.float32)
    assert "multiple of 8" in refusal({}, sizes=(60, 60))
    assert "of one size" in refusal({}, sizes=(64, 128))
    assert "up to 128" in refusal({}, sizes=(256, 256), capability="8.0")
    assert "compute capability 8.0" in refusal({}, capability="7.5")
    assert "even lengths" in refusal({}, length=7)


def test_cudnn_says_why_not():
    narrow = {n: v.astype(jnp.bfloat16) for n, v in draw(40, 40).items()}
    with pytest.raises(
        ValueError, match="impl='cudnn' of attention cannot take this call: it needs an NVIDIA GPU"
    ):
        attention(**narrow, impl="cudnn")
    with pytest.raises(ValueError, match="impl='cudnn' is not an implementation of attention_with_lse"):
        attention_with_lse(**narrow, impl="cudnn")


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


PADDED = Segments.of(
    jnp.repeat(jnp.array([[1, 1, 1, 0], [2, 0, 0, 0], [0, 0, 0, 0]]), 32, 1), padding="end", packed=False
)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "mask": Mask(window=20)}])
def test_cudnn_leaves_out_padding(options):
    """Whatever stands there, not a number included, outputs and gradients are those of the reference, zero at padding."""
    shapes = {"q": (3, 128, 8, 64), "k": (3, 128, 2, 64), "v": (3, 128, 2, 64)}
    arguments = {n: normal(i, *shape).astype(jnp.bfloat16) for i, (n, shape) in enumerate(shapes.items())}

    def loss(arguments, impl):
        output = attention(**arguments, **options, segment_ids=PADDED, impl=impl).astype(jnp.float32)
        return (output * normal(9, *output.shape)).sum(), output

    run = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    spoilt = {n: jnp.where(PADDED.real[..., None, None], v, jnp.nan) for n, v in arguments.items()}
    got = run(spoilt, "cudnn")
    want = run({n: v.astype(jnp.float32) for n, v in arguments.items()}, "reference")
    close(got[1], want[1], 1e-2, "output")
    assert (np.asarray(got[1])[~np.asarray(PADDED.real)] == 0).all()
    for name in want[0]:
        close(got[0][name].astype(jnp.float32), want[0][name], 1e-2, f"gradient of {name}")
        assert (np.asarray(got[0][name], np.float32)[~np.asarray(PADDED.real)] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"causal": True, "mask": Mask(window=50), "scale": 0.2}]
)
@pytest.mark.parametrize("t", [2, 130, 512])
def test_cudnn_matches_the_reference(options, t):
    shapes = {"q": (2, t, 8, 64), "k": (2, t, 2, 64), "v": (2, t, 2, 64)}
    arguments = {n: normal(i, *shape).astype(jnp.bfloat16) for i, (n, shape) in enumerate(shapes.items())}

    def loss(arguments, impl):
        output = attention(**arguments, **options, impl=impl).astype(jnp.float32)
        return (output * normal(9, *output.shape)).sum(), output

    run = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    got, want = (
        run(arguments, "cudnn"),
        run({n: v.astype(jnp.float32) for n, v in arguments.items()}, "reference"),
    )
    close(got[1], want[1], 1e-2, "output")
    for name in want[0]:
        close(got[0][name].astype(jnp.float32), want[0][name], 1e-2, f"gradient of {name}")
