"""Cross-entropy of labels at positions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tasks.tokens import IGNORE, cross_entropy
from experiments.training.step import means
from layers.cross_entropy import Unprojected

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(5, 4, 3)).astype(np.float32)
LABELS = np.array([[0, -1, 2, 1], [-1, -1, -1, -1], [1, 1, 1, -1], [2, -1, -1, -1], [0, 0, 0, 0]], np.int32)
WEIGHT = np.array([1, 1, 1, 1, 0], np.float32)
BATCH = {"labels": LABELS, "weight": WEIGHT}


def expected():
    loss = accuracy = count = whole = rows = 0.0
    for logits, labels, weight in zip(LOGITS.astype(np.float64), LABELS, WEIGHT, strict=True):
        places = [p for p in range(4) if labels[p] != IGNORE and weight > 0]
        hits = [int(np.argmax(logits[p]) == labels[p]) for p in places]
        loss += sum(np.log(np.exp(logits[p]).sum()) - logits[p, labels[p]] for p in places)
        accuracy, count = accuracy + sum(hits), count + len(hits)
        whole, rows = whole + (len(hits) > 0 and all(hits)), rows + (len(hits) > 0)
    return dict(
        loss=loss, accuracy=accuracy, sequence_accuracy=whole, sequence_accuracy_count=rows, count=count
    )


def test_against_the_formula():
    mean, sums = jax.jit(cross_entropy)(LOGITS, BATCH)
    assert sums.keys() == expected().keys()
    for name, value in expected().items():
        assert sums[name].dtype == jnp.float32
        np.testing.assert_allclose(sums[name], value, rtol=1e-6)
    np.testing.assert_allclose(mean, expected()["loss"] / 7, rtol=1e-6)


def test_the_same_without_logits():
    matrix = RNG.normal(size=(3, 6)).astype(np.float32)
    x = np.linalg.lstsq(matrix, LOGITS.reshape(-1, 3).T, rcond=None)[0].T.reshape(5, 4, 6).astype(np.float32)
    mean, sums = jax.jit(cross_entropy)(Unprojected(x, matrix), BATCH)
    for name, value in expected().items():
        assert sums[name].dtype == jnp.float32
        np.testing.assert_allclose(sums[name], value, rtol=1e-5)
    np.testing.assert_allclose(mean, expected()["loss"] / 7, rtol=1e-5)


def test_the_z_loss_is_in_the_loss_and_out_of_the_cross_entropy():
    matrix = RNG.normal(size=(3, 6)).astype(np.float32)
    x = np.linalg.lstsq(matrix, LOGITS.reshape(-1, 3).T, rcond=None)[0].T.reshape(5, 4, 6).astype(np.float32)
    counted = (LABELS != IGNORE) & (WEIGHT > 0)[:, None]
    squares = (np.log(np.exp(LOGITS.astype(np.float64)).sum(-1)) ** 2)[counted].sum()
    for outputs in (LOGITS, Unprojected(x, matrix)):
        mean, sums = jax.jit(functools.partial(cross_entropy, z_loss=0.25))(outputs, BATCH)
        np.testing.assert_allclose(sums["cross_entropy"], expected()["loss"], rtol=1e-5)
        np.testing.assert_allclose(sums["loss"], expected()["loss"] + 0.25 * squares, rtol=1e-5)
        np.testing.assert_allclose(mean, sums["loss"] / 7, rtol=1e-6)


def test_a_right_answer_everywhere_and_one_mistake():
    logits = 9 * jax.nn.one_hot(np.maximum(LABELS, 0), 3)
    sums = cross_entropy(logits, BATCH)[1]
    assert (sums["accuracy"], sums["sequence_accuracy"], sums["count"]) == (7, 3, 7)
    sums = cross_entropy(logits.at[2, 1].set(jnp.array([9.0, 0.0, 0.0])), BATCH)[1]
    assert (sums["accuracy"], sums["sequence_accuracy"], sums["count"]) == (6, 2, 7)


def test_positions_without_label_and_rows_of_weight_zero_count_for_nothing():
    poisoned = LOGITS.copy()
    poisoned[(LABELS == IGNORE) | (WEIGHT == 0)[:, None]] = np.nan
    value_and_grad = jax.value_and_grad(lambda logits: cross_entropy(logits, BATCH)[0])
    for one, other in zip(value_and_grad(poisoned), value_and_grad(LOGITS), strict=True):
        np.testing.assert_array_equal(one, other)


def test_averages_have_their_own_counts():
    sums = cross_entropy(LOGITS, BATCH)[1]
    found = means(tuple(sums), np.array(list(sums.values())))
    exact = expected()
    assert found.keys() == {"loss", "accuracy", "sequence_accuracy"}
    assert found["accuracy"] == pytest.approx(exact["accuracy"] / 7)
    assert found["sequence_accuracy"] == pytest.approx(exact["sequence_accuracy"] / 3)


@pytest.mark.parametrize("name", ["labels", "weight"])
def test_shapes_must_belong_together(name):
    with pytest.raises(ValueError, match=r"\(5, 4, 3\)"):
        cross_entropy(LOGITS, BATCH | {name: BATCH[name][:4]})
