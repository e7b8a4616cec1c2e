"""Models as pure functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.training.model import SplitModel
from layers.cross_entropy import Unprojected
from seqmodels import build_model
from tests.experiments.tiny import TinyModel

BATCH = {"inputs": jnp.array([[1, 2, 3], [3, 1, 0]]), "segment_ids": jnp.array([[1, 1, 1], [1, 1, 0]])}


def tiny_model(rngs=None):
    return TinyModel(5, 3, dropout=0.5, rngs=rngs or nnx.Rngs(0))


@pytest.mark.parametrize("training", [False, True])
def test_a_split_model_computes_what_the_model_does(training):
    split, model = SplitModel(tiny_model), tiny_model()
    key = jax.random.key(3) if training else None
    parameters, before = jax.jit(split.initialise)(jax.random.key(0))
    output, statistics = jax.jit(split.__call__)(parameters, before, BATCH, key=key)
    expected, _ = model(BATCH["inputs"], segment_ids=BATCH["segment_ids"], key=key)
    np.testing.assert_allclose(output, expected, rtol=1e-6)
    np.testing.assert_allclose(statistics["mean"], model.mean[...], rtol=1e-6)
    assert training == bool(np.any(statistics["mean"] != before["mean"]))


@pytest.mark.sample(2)
@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_may_leave_its_logits_to_the_loss(tied):
    config = dict(
        kind="language_model", vocab_size=5, width=4, depth=1, pattern=("s4d",), tie_embeddings=tied
    )
    options = {}, {"unprojected": True}
    whole, split = (SplitModel(lambda rngs: build_model(config, rngs=rngs), **more) for more in options)
    parameters, statistics = split.initialise(jax.random.key(0))
    output, _ = split(parameters, statistics, BATCH, key=None)
    logits, _ = whole(parameters, statistics, BATCH, key=None)
    assert isinstance(output, Unprojected)
    np.testing.assert_array_equal(output.logits, logits)
    tiny = SplitModel(tiny_model, unprojected=True)
    assert tiny(*tiny.initialise(jax.random.key(0)), BATCH, key=None)[0].shape == (2, 3)


def test_groups_and_sizes_are_read_from_the_model():
    split = SplitModel(tiny_model)
    assert {name: declaration.group for name, declaration in split.parameters.items()} == {
        "table": "default",
        "log_dt": "ssm/dt",
        "head": "default",
        "bias": "no_decay",
    }
    assert split.num_parameters == 5 * 4 + 4 + 4 * 3 + 3


class Cache(nnx.Variable):
    pass


@pytest.mark.parametrize(
    "variable, error, message",
    [
        (nnx.Param(jnp.zeros(2, jnp.float16)), TypeError, "extra is float16"),
        (nnx.Param(jnp.zeros(2, jnp.complex64)), TypeError, "extra is complex64.*real and imaginary parts"),
        (Cache(jnp.zeros(2)), ValueError, r"holds extra \(Cache\)"),
    ],
)
def test_variables_that_training_cannot_store_are_named(variable, error, message):
    def make(rngs):
        model = tiny_model(rngs)
        model.extra = variable
        return model

    with pytest.raises(error, match=message):
        SplitModel(make)
