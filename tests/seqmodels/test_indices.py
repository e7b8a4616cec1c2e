"""Token ids and labels out of range: an error that names them where values are at hand, NaN in compiled code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.data.pipeline import check_batch
from experiments.tasks import classification, tokens
from seqmodels.config import InputConfig
from seqmodels.embedding import SMALL_TABLE, Embedding

OUTSIDE = (8, 300, -1, -100)


@pytest.mark.parametrize("vocab_size", [8, SMALL_TABLE + 1])
def test_token_ids(vocab_size):
    embedding = Embedding(InputConfig(vocab_size=vocab_size), 3, jnp.dtype("float32"), rngs=nnx.Rngs(0))
    graph, variables = nnx.split(embedding)

    @jax.jit
    def run(variables, ids, segment_ids):
        def loss(variables):
            x, _ = nnx.merge(graph, variables)(ids, segment_ids=segment_ids)
            return jnp.where((segment_ids != 0)[..., None], x, 0).sum(), x

        (_, x), gradient = jax.value_and_grad(loss, has_aux=True)(variables)
        return x, gradient["table"][...]

    for outside in (vocab_size, *OUTSIDE[1:]):
        ids, real = jnp.asarray([[1, outside, 2]]), jnp.ones((1, 3), jnp.int32)
        expected = rf"inputs\[0, 1\] is {outside}; expected 0 to {vocab_size - 1}, as vocab_size={vocab_size}"
        with pytest.raises(ValueError, match=expected):
            embedding(ids)
        x, _ = run(variables, ids, real)
        assert np.isnan(x[0, 1]).all()
        np.testing.assert_array_equal(np.asarray(x)[0, [0, 2]], np.asarray(embedding.table[...])[[1, 2]])
        # At padding it may be anything, and no row of the table hears of it.
        padding = real.at[0, 1].set(0)
        np.testing.assert_array_equal(*(run(variables, i, padding)[1] for i in (ids, ids.at[0, 1].set(3))))
        embedding(ids, segment_ids=padding)


def of_sequences(labels):
    return classification.cross_entropy, (len(labels), 4), labels


def of_positions(labels):
    return tokens.cross_entropy, (1, len(labels), 4), labels[None]


@pytest.mark.parametrize("kind", [of_sequences, of_positions])
@pytest.mark.parametrize("outside", [4, 300, -5, -100])
def test_labels(kind, outside):
    loss, shape, labels = kind(np.asarray([1, outside, 2]))
    logits = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    batch = {"labels": jnp.asarray(labels), "weight": jnp.ones(shape[0])}
    with pytest.raises(ValueError, match=rf"labels\[.*1\] is {outside}; expected 0 to 3"):
        loss(logits, batch)
    value, gradient = jax.jit(jax.value_and_grad(lambda logits, batch: loss(logits, batch)[0]))(logits, batch)
    assert np.isnan(value)
    assert np.isnan(gradient).any()


@pytest.mark.slow
def test_labels_that_do_not_count_may_be_anything():
    logits = jnp.ones((2, 3, 4))
    ignored = {"labels": jnp.asarray([[0, -1, 3], [9, -7, 300]]), "weight": jnp.asarray([1.0, 0.0])}
    loss, sums = tokens.cross_entropy(logits, ignored)
    assert np.isfinite(loss)
    assert sums["count"] == 2
    ignored = {"labels": jnp.asarray([3, -100]), "weight": jnp.asarray([1.0, 0.0])}
    assert np.isfinite(classification.cross_entropy(logits[:, 0], ignored)[0])
    with pytest.raises(ValueError, match=r"labels\[0\] is -1"):
        classification.cross_entropy(logits[:, 0], {"labels": jnp.asarray([-1, 0]), "weight": jnp.ones(2)})


def test_batches_of_the_pipeline():
    inputs, padding = np.asarray([[1, 2, 99]], np.int32), np.asarray([[1, 1, 0]], np.int32)
    sizes = {"vocab_size": 8, "num_classes": 3}
    check_batch({"inputs": inputs, "segment_ids": padding, "labels": np.asarray([2])}, sizes)
    check_batch({"inputs": inputs[:, :2], "labels": np.asarray([[-1, 7]])}, sizes)
    for batch, message in (
        ({"inputs": inputs}, r"inputs\[0, 2\] is 99; expected 0 to 7, as vocab_size=8"),
        ({"inputs": inputs[:, :2], "labels": np.asarray([3])}, r"labels\[0\] is 3; expected 0 to 2"),
        ({"inputs": inputs[:, :2], "labels": np.asarray([[-100, 1]])}, r"labels\[0, 0\] is -100"),
    ):
        with pytest.raises(ValueError, match=message):
            check_batch(batch, sizes)
