"""MrT5's gate is its equation, deletes softly what it deletes, and what remains keeps segments, positions and labels."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.kernels.attention import Logits, Tokens, attention
from layers.reduction import DeletionGate, DeletionGateConfig, remaining
from layers.segments import Segments

IDS = np.array([[0, 3, 3, 3, 7, 7, 7, 7], [1, 1, 1, 1, 1, 1, 0, 0]])
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 8, 6)).astype(np.float32)


def test_gates_are_those_of_the_equation():
    gate = DeletionGate(DeletionGateConfig(6, strength=20.0), rngs=nnx.Rngs(0))
    assert np.all(gate.gate.bias[...] == 1)
    gate.norm.scale.set_value(jnp.asarray(RNG.normal(size=6)))
    x = X.astype(np.float64)
    normal = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    normal = normal * np.asarray(gate.norm.scale[...], np.float64)
    score = normal @ np.asarray(gate.gate.kernel[...], np.float64)[:, 0] + 1
    expected = np.where(IDS == 0, -20, -20 / (1 + np.exp(score)))
    gates = gate(jnp.asarray(np.where(IDS[..., None] == 0, np.nan, X)), segment_ids=jnp.asarray(IDS))
    np.testing.assert_allclose(gates, expected, atol=1e-5)
    np.testing.assert_array_equal(gate.kept(gates), expected > -10)
    share = gate.share(gates, segment_ids=jnp.asarray(IDS))
    np.testing.assert_allclose(share, expected[IDS != 0].mean(), rtol=1e-6)


def test_what_remains_keeps_segments_positions_and_labels_and_returns_to_its_place():
    kept = np.array([[1, 1, 0, 1, 0, 1, 0, 1], [1, 0, 0, 1, 1, 1, 1, 1]], bool)
    left = remaining(jnp.asarray(kept), 5, segment_ids=Segments.of(jnp.asarray(IDS), packed=2))
    labels = np.arange(16).reshape(2, 8)
    np.testing.assert_array_equal(left.take(jnp.asarray(labels), -1), [[1, 3, 5, 7, -1], [8, 11, 12, 13, -1]])
    np.testing.assert_array_equal(left.segments.numbers, [[1, 1, 2, 2, 0], [1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(left.segments.positions[:, :4], [[0, 1, 0, 1], [0, 1, 2, 3]])
    np.testing.assert_array_equal(left.placed.positions[:, :4], [[0, 2, 1, 3], [0, 3, 4, 5]])
    y = left.take(jnp.asarray(X))
    restored = left.restore(jnp.zeros_like(X), y)
    np.testing.assert_array_equal(restored, np.where((kept & (IDS != 0))[..., None], X, 0))
    # Those for which there is no room leave.
    np.testing.assert_array_equal(remaining(jnp.asarray(kept), 2).places, [[0, 1], [0, 3]])


def test_a_strong_gate_deletes_softly_what_leaves_in_inference():
    kept = RNG.random((2, 8)) < 0.5
    kept[:, 1:6:4] = True
    q, k, v = (jnp.asarray(RNG.normal(size=(2, 8, 1, 4)), jnp.float32) for _ in range(3))
    gates = jnp.where(jnp.asarray(kept), 0.0, -1e4)
    segments = Segments.of(jnp.asarray(IDS))
    slopes = jnp.asarray([0.5])

    @jax.jit
    def both(q, k, v):
        soft = attention(
            q, k, v, logits=Logits(bias=gates[:, None, None, :], slopes=slopes), segment_ids=segments
        )
        left = remaining(jnp.asarray(kept), 8, segment_ids=segments)
        positions = left.placed.positions
        tokens = Tokens(left.placed.numbers, positions, positions)
        options = dict(logits=Logits(slopes=slopes), segment_ids=left.placed.numbers, tokens=tokens)
        return soft, left.restore(jnp.zeros_like(q), attention(*map(left.take, (q, k, v)), **options))

    soft, hard = map(np.asarray, both(q, k, v))
    there = kept & (IDS != 0)
    np.testing.assert_allclose(soft[there], hard[there], atol=2e-6)
