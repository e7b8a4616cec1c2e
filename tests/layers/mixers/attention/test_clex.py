"""CLEX against its equation in NumPy: a literal Runge-Kutta solver, and attention whose pairs turn by the solved angles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.mixers import make_mixer
from layers.positions.clex import Clex, ClexFrequencies
from layers.segments import Segments
from tests.layers.mixers.literal import apply, heads, in_two_calls, masked_softmax, wide

BASE, STEPS, MOST, TRAINED, HEADS, TIME = 50.0, 4, 4, 5, 2, 14
OPTIONS = {"name": "clex", "length": TRAINED, "max_factor": MOST, "base": BASE, "steps": STEPS, "expand": 2}
IDS = np.array([[1] * TIME, [1] * 4 + [2] * 8 + [0] * 2])
X = np.random.default_rng(0).standard_normal((2, TIME, 12)).astype(np.float32)


def trained(module):
    """The module with a second map that is not zero."""
    w = module.down
    w.set_value(0.3 * jax.random.normal(jax.random.key(1), w.shape))
    return module


def solved(module, activation=np.tanh):
    """exp z(s) for s = 1, 2, ..., in float64."""
    up, down = wide(module.up), wide(module.down)
    pairs = len(up)
    size, i = 2 * pairs, np.arange(pairs)

    def derivative(s, z):
        alpha = 2 * s - 1
        ntk = (BASE * alpha ** (size / (size - 2))) ** (-2 * i / size)
        change = -2 * (2 * i) / (size - 2) / (BASE ** (2 * i / size) * alpha ** (2 * i / (size - 2) + 1))
        return activation((z + np.log(ntk)) @ up) @ down + change / ntk

    z, h = np.log(BASE ** (-2 * i / size)), 1 / STEPS
    found = [z]
    for number in range((MOST - 1) * STEPS):
        s = 1 + number * h
        k1 = derivative(s, z)
        k2 = derivative(s + h / 3, z + h * k1 / 3)
        k3 = derivative(s + h * 2 / 3, z + h * (k2 - k1 / 3))
        k4 = derivative(s + h, z + h * (k1 - k2 + k3))
        z = z + (k1 + 3 * (k2 + k3) + k4) * h / 8
        if (number + 1) % STEPS == 0:
            found.append(z)
    return np.exp(found)


def test_frequencies_solve_the_equation():
    options = {key: value for key, value in OPTIONS.items() if key != "name"}
    module = trained(ClexFrequencies(Clex(**options), 8, rngs=nnx.Rngs(0)))
    got = jax.jit(lambda module: module())(module)
    np.testing.assert_allclose(got, solved(module), rtol=3e-6)
    assert np.abs(np.diff(np.log(got), axis=0)).min() > 1e-3
    silu = trained(ClexFrequencies(Clex(**options | {"activation": "silu"}), 8, rngs=nnx.Rngs(0)))
    np.testing.assert_allclose(
        jax.jit(lambda module: module())(silu), solved(silu, lambda x: x / (1 + np.exp(-x))), rtol=3e-6
    )


def test_before_training_a_factor_raises_the_base():
    module = ClexFrequencies(Clex(length=64, max_factor=8), 16, rngs=nnx.Rngs(0))
    alpha = 2 * np.arange(1, 9)[:, None] - 1
    want = (10_000.0 * alpha ** (16 / 14)) ** (-np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(module(), want, rtol=1e-5)


@pytest.mark.parametrize(("length", "factor"), [(1, 1), (5, 1), (6, 2), (10, 2), (11, 3), (99, 4)])
def test_the_factor_of_a_length(length, factor):
    assert Clex(length=TRAINED, max_factor=MOST).factor(length) == factor


def attended(mixer, x, frequencies):
    """Causal attention of one sequence whose pairs turn by these angles per token."""
    q, k, v = (heads(apply(f, x), HEADS) for f in (mixer.query, mixer.key, mixer.value))
    half = q.shape[-1] // 2
    turn = np.exp(1j * np.arange(len(x))[:, None, None] * frequencies)
    q, k = ((y[..., :half] + 1j * y[..., half:]) * turn for y in (q, k))
    logits = np.einsum("thk,shk->hts", q, k.conj()).real / np.sqrt(2 * half)
    weights = masked_softmax(logits, np.tril(np.ones((len(x), len(x)), bool)))
    return apply(mixer.output, np.einsum("hts,shk->thk", weights, v).reshape(x.shape))


@pytest.fixture(scope="module")
def mixer():
    made = make_mixer(
        "attention", {"heads": HEADS, "position": OPTIONS}, given={"width": 12}, rngs=nnx.Rngs(0)
    )
    trained(made.position.solved)
    return made


@pytest.mark.parametrize("padding", ["anywhere", "end"])
def test_each_segment_has_the_angles_of_its_length(mixer, padding):
    segments = Segments.of(jnp.asarray(IDS), padding=padding)
    got = np.asarray(nnx.jit(lambda mixer, x: mixer(x, segment_ids=segments)[0])(mixer, jnp.asarray(X)))
    angles = solved(mixer.position.solved)
    for row, start, stop, factor in ((0, 0, TIME, 3), (1, 0, 4, 1), (1, 4, 12, 2)):
        want = attended(mixer, X[row, start:stop].astype(np.float64), angles[factor - 1])
        np.testing.assert_allclose(got[row, start:stop], want, atol=2e-5)


def test_padding_that_is_known_to_end_a_row_does_not_count(mixer):
    ids = Segments.of(jnp.asarray([[1] * 8 + [0] * 6]), padding="end", packed=False)
    y = nnx.jit(lambda mixer, x: mixer(x, segment_ids=ids)[0])(mixer, jnp.asarray(X[:1]))
    want = attended(mixer, X[0, :8].astype(np.float64), solved(mixer.position.solved)[1])
    np.testing.assert_allclose(y[0, :8], want, atol=2e-5)


def test_a_cache_has_the_angles_of_the_rows_that_it_is_for(mixer):
    y, state = in_two_calls(mixer, jnp.asarray(X[:1]))
    angles = solved(mixer.position.solved)[2]
    np.testing.assert_allclose(y[0], attended(mixer, X[0].astype(np.float64), angles), atol=2e-5)
    np.testing.assert_allclose(state.carried.frequencies[0], angles, rtol=3e-6)
    assert not mixer.takes_cache_policy


def test_gradients_reach_the_equation(mixer):
    def loss(mixer):
        return jnp.sum(mixer(jnp.asarray(X))[0] ** 2)

    grads = nnx.jit(nnx.grad(loss))(mixer).position.solved
    assert all(float(jnp.abs(leaf).max()) > 1e-4 for leaf in jax.tree.leaves(grads))
