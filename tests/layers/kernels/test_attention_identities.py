"""`attention` in other words: caches, pieces over other keys, biases for slopes, repeated heads, jax.nn."""

import functools
import itertools

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
)
from tests.layers.kernels.test_attention import (
    BIAS,
    KEY,
    SLOPES,
    VALUE,
    B,
    G,
    H,
    T,
    close,
    draw,
    normal,
)


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


@pytest.mark.sample(3)
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


@pytest.mark.slow
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
        output, lse, _ = run(arguments, *order)
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


def test_large_logits_pick_one_key():
    q = k = jnp.eye(8)[None, :, None] * 1e4
    output, lse, _ = attention_with_lse(q, k, jnp.eye(8)[None, :, None], scale=1.0)
    assert np.array_equal(output[0, :, 0], np.eye(8))
    assert np.allclose(lse, 1e8)
