"""Models as pure functions, and their parameters as vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.training.model import Layout, SplitModel
from tests.experiments.tiny import TinyModel

BATCH = {"inputs": jnp.array([[1, 2, 3], [3, 1, 0]]), "segment_ids": jnp.array([[1, 1, 1], [1, 1, 0]])}


def tiny_model():
    return TinyModel(5, 3, dropout=0.5, rngs=nnx.Rngs(0))


def test_vectors_hold_the_arrays_of_their_group():
    arrays = {("a", 0): np.arange(6.0).reshape(2, 3), ("a", 1): np.arange(4.0), ("b",): np.full((), 7.0)}
    layout = Layout.of(arrays, {("a", 0): "x", ("a", 1): "y", ("b",): "x"})
    vectors = layout.join(arrays)
    assert layout.sizes == {"x": 7, "y": 4}
    np.testing.assert_array_equal(vectors["x"], [0, 1, 2, 3, 4, 5, 7])
    back = layout.cut(vectors)
    assert back.keys() == arrays.keys()
    for path, array in arrays.items():
        np.testing.assert_array_equal(back[path], array)


@pytest.mark.parametrize("training", [False, True])
def test_a_split_model_computes_what_the_model_does(training):
    split, model = SplitModel(tiny_model()), tiny_model()
    key = jax.random.key(3) if training else None
    output, statistics = jax.jit(split.__call__)(split.parameters, split.statistics, BATCH, key=key)
    expected, _ = model(BATCH["inputs"], segment_ids=BATCH["segment_ids"], key=key)
    np.testing.assert_allclose(output, expected, rtol=1e-6)
    np.testing.assert_allclose(statistics["mean",], model.mean[...], rtol=1e-6)
    assert training == bool(np.any(statistics["mean",] != split.statistics["mean",]))


def test_groups_and_sizes_are_read_from_the_model():
    split = SplitModel(tiny_model())
    assert split.declared_groups == {
        ("table",): "default",
        ("log_dt",): "ssm/dt",
        ("head",): "default",
        ("bias",): "no_decay",
    }
    assert split.num_parameters == 5 * 4 + 4 + 4 * 3 + 3


class Cache(nnx.Variable):
    pass


@pytest.mark.parametrize(
    "variable, error, message",
    [
        (nnx.Param(jnp.zeros(2, jnp.bfloat16)), TypeError, "extra is bfloat16"),
        (nnx.Param(jnp.zeros(2, jnp.complex64)), TypeError, "extra is complex64.*real and imaginary parts"),
        (Cache(jnp.zeros(2)), ValueError, r"holds extra \(Cache\)"),
    ],
)
def test_variables_that_training_cannot_store_are_named(variable, error, message):
    model = tiny_model()
    model.extra = variable
    with pytest.raises(error, match=message):
        SplitModel(model)
