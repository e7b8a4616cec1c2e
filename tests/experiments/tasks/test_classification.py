"""Cross-entropy of one label a sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tasks.classification import cross_entropy

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(6, 4)).astype(np.float32)
LABELS = np.array([0, 1, 2, 3, 0, 1], np.int32)
WEIGHT = np.array([1, 1, 0, 1, 0, 1], np.float32)
BATCH = {"labels": LABELS, "weight": WEIGHT}


def expected_sums(logits):
    logits = np.asarray(logits, np.float64)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(6), LABELS]
    correct = logits.argmax(axis=1) == LABELS
    return {"loss": (WEIGHT * losses).sum(), "accuracy": (WEIGHT * correct).sum(), "count": WEIGHT.sum()}


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 1e-6)])
def test_against_the_formula(dtype, tolerance):
    logits = jnp.asarray(LOGITS, dtype)
    mean, sums = jax.jit(cross_entropy)(logits, BATCH)
    expected = expected_sums(logits.astype(jnp.float32))
    assert sums.keys() == expected.keys()
    for name, value in expected.items():
        assert sums[name].dtype == jnp.float32
        np.testing.assert_allclose(sums[name], value, rtol=tolerance)
    np.testing.assert_allclose(mean, expected["loss"] / 4, rtol=tolerance)


def test_accuracy_counts_hits():
    logits = 5 * jax.nn.one_hot(jnp.array([0, 1, 2, 0, 0, 1]), 4)
    _, sums = cross_entropy(logits, BATCH)
    assert sums["accuracy"] == 3


def test_sums_add_up_over_batches():
    _, whole = cross_entropy(LOGITS, BATCH)
    parts = [
        cross_entropy(LOGITS[rows], {name: array[rows] for name, array in BATCH.items()})[1]
        for rows in (slice(0, 2), slice(2, 6))
    ]
    for name, value in whole.items():
        np.testing.assert_allclose(parts[0][name] + parts[1][name], value, rtol=1e-6)


def test_rows_of_weight_zero_count_for_nothing():
    poisoned = LOGITS.copy()
    poisoned[WEIGHT == 0] = np.nan
    value_and_grad = jax.value_and_grad(lambda logits: cross_entropy(logits, BATCH)[0])
    for one, other in zip(value_and_grad(poisoned), value_and_grad(LOGITS), strict=True):
        np.testing.assert_array_equal(one, other)


def test_no_weight_at_all():
    mean, sums = cross_entropy(LOGITS, BATCH | {"weight": np.zeros(6, np.float32)})
    assert mean == 0
    assert sums["count"] == 0


@pytest.mark.parametrize("name", ["labels", "weight"])
def test_shapes_must_belong_together(name):
    with pytest.raises(ValueError, match=r"\(6, 4\)"):
        cross_entropy(LOGITS, BATCH | {name: BATCH[name][:5]})
    with pytest.raises(ValueError, match=r"logits must be"):
        cross_entropy(LOGITS[None], BATCH)
