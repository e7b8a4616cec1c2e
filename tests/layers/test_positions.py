"""Encodings of position against their equations in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.positions import Position, Rotary, read_position, rotary, sinusoidal
from layers.positions.angles import cos_sin
from layers.positions.relative import alibi_slopes, relative_buckets
from layers.positions.rotary import rotary_frequencies


def test_is_a_rotation_in_the_complex_plane():
    x = np.random.default_rng(0).standard_normal((1, 5, 2, 6)).astype(np.float32)
    got = np.asarray(rotary(jnp.asarray(x), jnp.arange(5)[None], 50.0))
    pairs = x[..., :3] + 1j * x[..., 3:]
    turned = pairs * np.exp(1j * np.arange(5)[None, :, None, None] * 50.0 ** (-np.arange(0, 6, 2) / 6))
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=1e-6)


def test_products_depend_on_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    products = [
        float(jnp.sum(rotary(q, jnp.array([[i]])) * rotary(k, jnp.array([[i - 3]])))) for i in (3, 50, 1000)
    ]
    np.testing.assert_allclose(products, products[0], rtol=1e-4)


def test_angles_are_right_after_a_million_tokens():
    positions = np.array([[-70_001, 0, 4095, 4096, 131_072, 1_000_003, 16_000_001]])
    frequencies = rotary_frequencies(64, Rotary())
    cos, sin = cos_sin(jnp.asarray(positions), frequencies)
    angle = positions[..., None] * frequencies
    np.testing.assert_allclose(cos, np.cos(angle), atol=2e-6)
    np.testing.assert_allclose(sin, np.sin(angle), atol=2e-6)


def test_an_odd_head_is_refused():
    with pytest.raises(ValueError, match="even head size, got 5"):
        rotary(jnp.zeros((1, 2, 1, 5)), jnp.zeros((1, 2), jnp.int32))


def test_part_of_a_head_is_turned():
    x = jax.random.normal(jax.random.key(0), (1, 5, 2, 8))
    positions = jnp.arange(5)[None]
    got = rotary(x, positions, Rotary(fraction=0.5))
    np.testing.assert_array_equal(got[..., 4:], x[..., 4:])
    np.testing.assert_allclose(got[..., :4], rotary(x[..., :4], positions), atol=1e-6)


def test_linear_scaling_squeezes_positions():
    x = jax.random.normal(jax.random.key(0), (1, 9, 1, 8))
    got = rotary(x, 4 * jnp.arange(9)[None], Rotary(scaling="linear", factor=4.0))
    np.testing.assert_allclose(got, rotary(x, jnp.arange(9)[None]), atol=1e-5)


def test_ntk_keeps_the_fastest_pair_and_divides_the_slowest():
    plain, scaled = (rotary_frequencies(64, Rotary(**o)) for o in ({}, {"scaling": "ntk", "factor": 8.0}))
    assert scaled[0] == plain[0]
    np.testing.assert_allclose(scaled[-1], plain[-1] / 8)
    assert (np.diff(plain / scaled) > 0).all()


def test_yarn_ramps_between_the_pairs_that_turn_32_times_and_once():
    # For 128 features and a length of 2048 these are pairs 16 and 41.
    rope = Rotary(scaling="yarn", factor=16.0, length=2048)
    ratio = rotary_frequencies(128, Rotary()) / rotary_frequencies(128, rope)
    np.testing.assert_allclose(ratio[:17], 1)
    np.testing.assert_allclose(ratio[41:], 16)
    assert (np.diff(ratio[16:42]) > 0).all()
    assert rope.gain == pytest.approx(0.1 * np.log(16) + 1)
    x = jax.random.normal(jax.random.key(0), (1, 3, 1, 128))
    turned = rotary(x, jnp.arange(3)[None], rope)
    np.testing.assert_allclose(jnp.linalg.norm(turned), rope.gain * jnp.linalg.norm(x), rtol=1e-5)


def test_giraffes_bases():
    plain = 10_000.0 ** (-np.arange(64) / 64)
    power = rotary_frequencies(128, Rotary(scaling="power", power=0.5))
    np.testing.assert_allclose(power, [f * (1 - i / 64) ** 0.5 for i, f in enumerate(plain)], rtol=1e-12)
    truncated = rotary_frequencies(128, Rotary(scaling="truncated", length=2048))
    # 41 of 64 pairs turn at least once within 2048 tokens; 14 get one frequency, and 9 none.
    np.testing.assert_array_equal(truncated[:41], rotary_frequencies(128, Rotary())[:41])
    np.testing.assert_allclose(truncated[41:55], 2 * np.pi / (16 * 2048), rtol=1e-12)
    np.testing.assert_array_equal(truncated[55:], 0)


def test_hope_turns_all_but_the_slowest_quarter_of_the_pairs():
    plain, hope = (rotary_frequencies(36, Rotary(scaling="linear", factor=2.0, still=s)) for s in (0.0, 0.25))
    np.testing.assert_array_equal(hope, np.concatenate([plain[:14], [0, 0, 0, 0]]))


def test_alibi_slopes():
    np.testing.assert_allclose(alibi_slopes(8), 2.0 ** -np.arange(1, 9))
    np.testing.assert_allclose(alibi_slopes(12)[8:], 2.0 ** -np.array([0.5, 1.5, 2.5, 3.5]))
    assert alibi_slopes(1) == 2.0**-8


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_against_the_formula(bidirectional):
    relative = np.arange(-300, 301)
    got = relative_buckets(jnp.asarray(relative), bidirectional=bidirectional, buckets=32, max_distance=128)
    for where, bucket in zip(relative, np.asarray(got), strict=True):
        distance = abs(where) if bidirectional else max(-where, 0)
        half = 16 if bidirectional else 32
        want = distance
        if distance >= half // 2:
            growth = np.log(distance / (half / 2)) / np.log(128 / (half / 2))
            want = min(half - 1, half // 2 + int(growth * half / 2 + 1e-9))
        assert bucket == want + (16 if bidirectional and where > 0 else 0), where


def test_t5_bias_is_one_number_a_head_and_bucket():
    position = Position(read_position("t5"), width=16, heads=3, causal=True, rngs=nnx.Rngs(0))
    bias = position.bias(jnp.array([[7, 200]]), jnp.array([[7, 4, 0]]))
    table = np.asarray(position.table[...])
    np.testing.assert_array_equal(bias[0, :, 0], table[[0, 3, 7]].T)
    np.testing.assert_array_equal(bias[0, :, 1], table[[31, 31, 31]].T)
    assert 0.5 < table.std() * 4 < 1.5


def test_fire_against_the_equation():
    position = Position(
        read_position({"name": "fire", "width": 5, "length": 6.0}),
        width=16,
        heads=3,
        causal=True,
        rngs=nnx.Rngs(0),
    )
    position.curvature[...], position.multiplier[...] = -0.7, -0.5
    got = position.bias(jnp.arange(10)[None], jnp.arange(10)[None])
    weights = [np.asarray(w[...], np.float64) for w in (position.hidden.kernel, position.hidden.bias)]
    out = [np.asarray(w[...], np.float64) for w in (position.output.kernel, position.output.bias)]
    for i in range(10):
        for j in range(i + 1):
            place = np.log(0.7 * (i - j) + 1) / (np.log(0.7 * max(i, 3.0) + 1) + 1e-6)
            want = np.maximum(place * weights[0][0] + weights[1], 0) @ out[0] + out[1]
            np.testing.assert_allclose(got[0, :, i, j], want, atol=1e-5)


def test_fire_needs_causality():
    with pytest.raises(ValueError, match="needs causal=True"):
        Position(read_position("fire"), width=8, heads=2, causal=False, rngs=nnx.Rngs(0))


def test_sinusoids_against_the_equation():
    got = np.asarray(sinusoidal(jnp.array([[0, 3, 70]]), 7))
    for t, p in enumerate((0, 3, 70)):
        for i in range(7):
            angle = p * 10_000.0 ** (-(i // 2 * 2) / 7)
            assert got[0, t, i] == pytest.approx(np.cos(angle) if i % 2 else np.sin(angle), abs=1e-5)
