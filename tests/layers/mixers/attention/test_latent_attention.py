"""Nystromformer and Luna against their equations in NumPy, and what their approximations become in the limit."""

import jax.numpy as jnp
import numpy as np
import pytest

from layers.mixers.attention.nystromformer import pseudo_inverse
from tests.layers.mixers.literal import apply, by_row, drawn, heads, softmax, tokens, wide

WIDTH, HEADS, TIME = 6, 2, 23


def rows_of(logits):
    return np.stack([softmax(row) for row in logits])


def convolved(v, taps):
    """Values (t, h, k) by centred filters (w, h)."""
    half = len(taps) // 2
    padded = np.pad(v, ((half, half), (0, 0), (0, 0)))
    return sum(taps[j][:, None] * padded[j : j + len(v)] for j in range(len(taps)))


def nystromformer(model, x):
    m, t, root = model.config.landmarks, len(x), np.sqrt(WIDTH / HEADS)
    q, k, v = (heads(apply(f, x), HEADS) for f in (model.query, model.key, model.value))
    y = np.zeros_like(q)
    piece = np.arange(t) * m // t
    for h in range(HEADS):
        if t <= m:
            y[:, h] = rows_of(q[:, h] @ k[:, h].T / root) @ v[:, h]
            continue
        mean_q, mean_k = (np.stack([z[piece == i, h].mean(0) for i in range(m)]) for z in (q, k))
        a = rows_of(mean_q @ mean_k.T / root)
        z = a.T / a.sum(0).max()
        one = np.eye(m)
        for _ in range(model.config.iterations):
            z = z @ (13 * one - a @ z @ (15 * one - a @ z @ (7 * one - a @ z))) / 4
        y[:, h] = rows_of(q[:, h] @ mean_k.T / root) @ z @ rows_of(mean_q @ k[:, h].T / root) @ v[:, h]
    if model.filter is not None:
        y = y + convolved(v, wide(model.filter))
    return apply(model.output, y.reshape(t, -1))


@pytest.mark.sample(3)
@pytest.mark.parametrize("time, taps", [(TIME, 5), (20, 0), (4, 5)])
def test_nystromformer_equals_its_equation(time, taps):
    """Pieces of unlike and of equal lengths, and a sequence of fewer tokens than landmarks."""
    model = drawn("nystromformer", WIDTH, heads=HEADS, landmarks=5, taps=taps, bias=True)
    x = tokens(time, WIDTH)
    np.testing.assert_allclose(model(x)[0], by_row(lambda x: nystromformer(model, x), x), atol=1e-5)


@pytest.mark.slow
def test_nystromformer_cuts_each_sequence_by_its_own_length():
    model = drawn("nystromformer", WIDTH, heads=HEADS, landmarks=5, taps=3)
    x = tokens(TIME, WIDTH)
    got = np.asarray(model(x, segment_ids=jnp.asarray([[1] * 12 + [2] * 11, [1] * 4 + [0] * 19]))[0])
    rows = np.asarray(x, np.float64)
    for row, part in ((0, slice(0, 12)), (0, slice(12, 23)), (1, slice(0, 4))):
        np.testing.assert_allclose(got[row, part], nystromformer(model, rows[row, part]), atol=1e-5)


def test_the_iteration_finds_the_pseudo_inverse():
    rng = np.random.default_rng(0)
    a = rows_of(6 * np.eye(7) + rng.standard_normal((7, 7)))
    z = pseudo_inverse(jnp.asarray(a, jnp.float32), 6)
    np.testing.assert_allclose(a @ np.asarray(z), np.eye(7), atol=1e-3)


def luna(model, x):
    config, root = model.config, np.sqrt(WIDTH / HEADS)
    n = min(config.latents, len(x)) if config.carried else 0
    p, rest = (x[:n], x[n:]) if config.carried else (wide(model.latents), x)
    q, pq = heads(apply(model.query, rest), HEADS), heads(apply(model.pack_query, p), HEADS)
    pk, pv = (heads(apply(f, rest), HEADS) for f in (model.pack_key, model.pack_value))
    packed = np.zeros_like(pq)
    for h in range(HEADS):
        if len(rest):
            packed[:, h] = rows_of(pq[:, h] @ pk[:, h].T / root) @ pv[:, h]
    packed = packed.reshape(len(p), -1)
    k, v = (heads(apply(f, packed), HEADS) for f in (model.key, model.value))
    y = (
        np.stack([rows_of(q[:, h] @ k[:, h].T / root) @ v[:, h] for h in range(HEADS)], axis=1)
        if len(rest)
        else q
    )
    y = apply(model.output, y.reshape(len(rest), WIDTH))
    return np.concatenate([packed, y]) if config.carried else y


@pytest.mark.sample(3)
@pytest.mark.parametrize("time, carried", [(TIME, True), (TIME, False), (3, True)])
def test_luna_equals_its_equation(time, carried):
    """With latents that come first, with its own, and with nothing behind the first."""
    model = drawn("luna", WIDTH, heads=HEADS, latents=3, carried=carried, bias=True)
    x = tokens(time, WIDTH)
    np.testing.assert_allclose(model(x)[0], by_row(lambda x: luna(model, x), x), atol=1e-5)


@pytest.mark.slow
def test_luna_without_positions_is_equivariant():
    """Latents see a set: tokens in another order give the outputs in that order."""
    model, order = drawn("luna", WIDTH, heads=HEADS, latents=3), np.random.default_rng(0).permutation(TIME)
    x = tokens(TIME, WIDTH)
    np.testing.assert_allclose(model(x[:, order])[0], model(x)[0][:, order], atol=1e-6)
