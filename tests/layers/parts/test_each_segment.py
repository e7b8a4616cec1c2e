"""Mixing every segment by itself: values and gradients are those of the sequences one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.mixers import make_mixer
from layers.parts.each_segment import mix_each_segment, reverse_segments
from layers.segments import Segments

IDS = np.array([[0, 1, 1, 0, 1, 2, 2, 0, 3, 3], [2, 1, 1, 1, 1, 1, 1, 1, 0, 0]])
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 10, 3)), jnp.float32)
WEIGHT = jnp.asarray(np.random.default_rng(1).standard_normal((3, 3)), jnp.float32)


def mix(weight, x, lengths):
    """Depends on order, on every token and on the length."""
    return jnp.cumsum(jnp.tanh(x @ weight), axis=1) * x.sum(1, keepdims=True) / lengths[:, None, None]


def one_by_one(weight, x):
    y = jnp.zeros_like(x)
    for row, number in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 1)):
        where = np.flatnonzero(IDS[row] == number)
        y = y.at[row, where].set(mix(weight, x[row, where][None], jnp.array([len(where)]))[0])
    return y


def together(weight, x):
    return mix_each_segment(mix, weight, x, segment_ids=jnp.asarray(IDS))


def test_values_and_gradients_are_those_of_the_sequences_one_by_one():
    np.testing.assert_allclose(together(WEIGHT, X), one_by_one(WEIGHT, X), atol=1e-6)
    got, want = (
        jax.jit(jax.grad(lambda w, x, f=f: jnp.sum(jnp.sin(f(w, x))), argnums=(0, 1)))(WEIGHT, X)
        for f in (together, one_by_one)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


@pytest.mark.parametrize("packed", [False, True])
def test_what_segments_know_changes_nothing(packed):
    """Padding at the ends, in rows of one segment or of several, told and not told."""
    ids = jnp.asarray([[1, 1, 2, 2, 2, 1, 1, 0, 0, 0] if packed else [1] * 7 + [0] * 3, [2] * 10])
    known = Segments.of(ids, padding="end", packed=packed)
    x = jnp.where((ids == 0)[..., None], jnp.nan, X)
    got, want = (mix_each_segment(mix, WEIGHT, x, segment_ids=given) for given in (known, ids))
    assert (want[0, 7:] == 0).all()
    np.testing.assert_allclose(got, want, atol=1e-6)
    np.testing.assert_array_equal(reverse_segments(x, known), reverse_segments(x, ids))


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", ["fnet", "hypermixer", "linformer", "wersa", "bidirectional", "luna"])
@pytest.mark.parametrize("with_ids", [False, True])
def test_rows_without_tokens(name, with_ids):
    options = {"linformer": {"max_length": 4}, "bidirectional": {"inner": "s5"}}.get(name, {})
    mixer = make_mixer(name, options, given={"width": 8}, rngs=nnx.Rngs(0))
    ids = jnp.zeros((2, 0), jnp.int32) if with_ids else None
    assert mixer(jnp.zeros((2, 0, 8)), segment_ids=ids)[0].shape == (2, 0, 8)
