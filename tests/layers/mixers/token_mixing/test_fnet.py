"""FNet against the double sum, and against the transform of every segment by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.mixers.token_mixing.fnet import FNet, FNetConfig

WIDTH = 5


def make(**options):
    return FNet(FNetConfig(WIDTH, **options), rngs=nnx.Rngs(0))


def draw(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def double_sum(x):
    time, width = x.shape
    in_time = np.exp(-2j * np.pi * np.outer(np.arange(time), np.arange(time)) / time)
    in_width = np.exp(-2j * np.pi * np.outer(np.arange(width), np.arange(width)) / width)
    return (in_time @ x.astype(complex) @ in_width).real


@pytest.mark.parametrize("time", [1, 7, 12])
def test_equals_the_double_sum(time):
    x = draw(2, time, WIDTH)
    got, _ = make()(jnp.asarray(x))
    np.testing.assert_allclose(got, np.stack([double_sum(row) for row in x]), atol=1e-4)


@pytest.mark.parametrize("orthonormal", [False, True])
def test_segments_of_any_length_have_their_own_transform(orthonormal):
    x = draw(2, 700, WIDTH)
    ids = np.zeros((2, 700), np.int32)
    ids[0, 3:614], ids[0, 620:621], ids[1, :256], ids[1, 256:] = 1, 2, 5, 4
    ids[1, 300:310] = 0
    run = jax.jit(lambda x, ids: make(orthonormal=orthonormal)(x, segment_ids=ids)[0])
    got = np.asarray(run(jnp.asarray(x), jnp.asarray(ids)))
    assert (got[ids == 0] == 0).all()
    for row, number in ((0, 1), (0, 2), (1, 5), (1, 4)):
        where = ids[row] == number
        want = double_sum(x[row, where])
        if orthonormal:
            want /= np.sqrt(where.sum() * WIDTH)
        # float32 sums over the segment
        np.testing.assert_allclose(got[row, where], want, atol=3e-6 * np.abs(want).max())


def test_orthonormal_outputs_are_as_large_as_half_of_the_inputs():
    """The real part holds half of the energy, which Parseval's equation keeps."""
    x = draw(1, 64, WIDTH)
    got, _ = make(orthonormal=True)(jnp.asarray(x))
    assert np.square(got).sum() == pytest.approx(np.square(x).sum() / 2, rel=0.2)
    plain, _ = make()(jnp.asarray(x))
    np.testing.assert_allclose(plain, np.sqrt(64 * WIDTH) * got, rtol=1e-4, atol=1e-4)


def test_twice_gives_the_even_part():
    x = draw(1, 9, 6)
    mixer = FNet(FNetConfig(6, orthonormal=True), rngs=nnx.Rngs(0))
    twice = mixer(mixer(jnp.asarray(x))[0])[0]
    turned = np.roll(np.roll(x[:, ::-1, ::-1], 1, axis=1), 1, axis=2)
    np.testing.assert_allclose(twice, (x + turned) / 2, atol=1e-6)
