"""CANINE's layers give what transformers 5.24 gives, and packed rows what their segments give alone."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.reduction import CharacterConfig, Downsample, HashEmbedding, HashEmbeddingConfig, Upsample
from layers.segments import Segments

# Modules of transformers with random parameters: CharactersToMolecules, _repeat_molecules, ConvProjection, hashed embeddings.
THEIRS = np.load(pathlib.Path(__file__).parent / "data" / "canine.npz")


def theirs(layer, name):
    layer.convolution.kernel.set_value(jnp.asarray(THEIRS[f"{name}_kernel"].reshape(-1, 6)))
    layer.convolution.bias.set_value(jnp.asarray(THEIRS[f"{name}_bias"]))
    layer.norm.scale.set_value(jnp.asarray(THEIRS[f"{name}_scale"]))
    layer.norm.bias.set_value(jnp.asarray(THEIRS[f"{name}_shift"]))
    return layer


@pytest.fixture(scope="module")
def layers():
    config = CharacterConfig(6)
    return theirs(Downsample(config, rngs=nnx.Rngs(0)), "down"), theirs(
        Upsample(config, rngs=nnx.Rngs(0)), "up"
    )


@jax.jit
def through(layers, x, segments):
    down, up = layers
    y, molecules = down(x, segment_ids=segments)
    return y, molecules, up(x, y, molecules, segment_ids=segments)


def test_embeddings_are_those_of_transformers():
    layer = HashEmbedding(HashEmbeddingConfig(6, hashes=3, buckets=11), rngs=nnx.Rngs(0))
    layer.tables.set_value(jnp.asarray(THEIRS["tables"]))
    np.testing.assert_array_equal(layer(jnp.asarray(THEIRS["codes"])), THEIRS["embedded"])


@pytest.mark.parametrize("name", ["long", pytest.param("short", marks=pytest.mark.slow)])
def test_molecules_and_characters_are_those_of_transformers(layers, name):
    x = jnp.asarray(THEIRS[f"{name}_x"])
    y, molecules, z = through(layers, x, None)
    np.testing.assert_allclose(y, THEIRS[f"{name}_molecules"], atol=2e-6)
    np.testing.assert_allclose(y[0, molecules.of_character[0]], THEIRS[f"{name}_repeated"][0], atol=2e-6)
    np.testing.assert_allclose(z, THEIRS[f"{name}_y"], atol=2e-6)


def test_packed_segments_are_reduced_and_restored_as_they_are_alone(layers):
    lengths = (14, 3, 8)
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(1, length, 6)).astype(np.float32) for length in lengths]
    ids = np.array([[0, 0] + [5] * 6 + [0] + [5] * 8 + [2] * 3 + [5] * 8 + [0]])
    x = np.full((1, ids.shape[1], 6), np.nan, np.float32)
    x[ids != 0] = np.concatenate(parts, axis=1)[0]
    y, molecules, z = through(layers, jnp.asarray(x), Segments.of(jnp.asarray(ids), packed=3))
    np.testing.assert_array_equal(molecules.segments.numbers[0], [1, 1, 1, 2, 3, 3] + [0] * 4)
    np.testing.assert_array_equal(molecules.segments.positions[0, :6], [0, 1, 2, 0, 0, 1])
    assert np.all(np.asarray(z)[ids == 0] == 0)
    assert np.all(np.asarray(y)[0, 6:] == 0)
    ends = np.cumsum(lengths)
    for number, part in enumerate(parts):
        own, _, restored = through(layers, jnp.asarray(part), None)
        here = np.asarray(molecules.segments.numbers[0]) == number + 1
        np.testing.assert_allclose(np.asarray(y)[0, here], own[0], atol=2e-6)
        found = np.asarray(z)[ids != 0][ends[number] - lengths[number] : ends[number]]
        np.testing.assert_allclose(found, restored[0], atol=2e-6)


def test_an_unknown_number_of_segments_is_refused(layers):
    with pytest.raises(ValueError, match=r"expected Segments.of\(segment_ids, packed=N\)"):
        layers[0](jnp.zeros((1, 4, 6)), segment_ids=jnp.ones((1, 4), jnp.int32))
