"""In-context linear regression: rows, loss and baselines against numpy's least squares and closed forms."""

import jax
import numpy as np
import pytest

from experiments.tasks import make_task
from experiments.tasks.synthetic.linear_regression import gradient_step, least_squares

SIZES = dict(train=40, validation=5, test=2000)


def pairs(task, split="test"):
    batch = task.splits[split].gather(np.arange(len(task.splits[split])), task.width(split))
    assert batch["inputs"].dtype == batch["labels"].dtype == np.float32
    return batch, batch["inputs"][:, ::2].astype(float), batch["inputs"][:, 1::2, 0].astype(float)


def test_rows_follow_one_linear_map_each():
    task = make_task("linear_regression", **SIZES, dims=3, points=6, sparse=2, extrapolate=(9,))
    batch, x, y = pairs(task)
    assert batch["inputs"].shape == (2000, 12, 3)
    assert not batch["inputs"][:, 1::2, 1:].any()
    np.testing.assert_array_equal(batch["labels"][:, ::2], batch["inputs"][:, 1::2, 0])
    assert np.isnan(batch["labels"][:, 1::2]).all()
    w = np.einsum("bdn,bn->bd", np.linalg.pinv(x), y)
    np.testing.assert_allclose(np.einsum("bnd,bd->bn", x, w), y, atol=2e-5)
    np.testing.assert_array_equal((np.abs(w) > 1e-4).sum(axis=1), 2)
    for values in (x, w[np.abs(w) > 1e-4]):
        assert abs(values.mean()) < 0.05
        assert abs(values.std() - 1) < 0.05
    assert (
        make_task("linear_regression", **SIZES, dims=3, points=6)
        .splits["test"]
        .gather(np.array([7, 2]), 14)["labels"][:, 12:]
        .astype(str)
        .tolist()
        == [["nan"] * 2] * 2
    )
    assert task.splits["length_9"].gather(np.arange(2), 18)["inputs"].shape == (2, 18, 3)
    noisy, _, values = pairs(make_task("linear_regression", **SIZES, dims=3, points=30, noise=0.5))
    fitted = least_squares(noisy["inputs"][:, ::2].astype(float), values)[:, -1]
    assert abs(np.std(fitted - values[:, -1]) - 0.5 * np.sqrt(1 + 3 / (29 - 3 - 1))) < 0.03


def test_the_loss_counts_inputs_of_rows_with_weight():
    task = make_task("linear_regression", dims=2, points=3, measured=(0, 2))
    nan = np.nan
    labels = np.array([[1.0, nan, 2.0, nan, 4.0, nan], [1.0, nan, 1.0, nan, 1.0, nan]], np.float32)
    outputs = np.array([[2.0, nan, 2.0, nan, 0.0, nan], [nan] * 6], np.float32)[..., None]
    batch = dict(labels=labels, weight=np.array([1, 0], np.float32))
    mean, sums = jax.jit(task.loss)(outputs, batch)
    assert {name: float(value) for name, value in sums.items()} == dict(
        loss=(1 + 0 + 16) / 2,
        count=3,
        error_after_0=0.5,
        error_after_0_count=1,
        error_after_2=8.0,
        error_after_2_count=1,
    )
    assert mean == pytest.approx(17 / 6)


def test_baselines_are_those_of_closed_forms():
    """The least-squares error is that of numpy's lstsq; that of a step, (d + 1) / (k + d + 1) in expectation."""
    options = dict(SIZES, test=16000, dims=3, points=7, measured=(0, 1, 3, 6))
    task = make_task("linear_regression", **options)
    _, x, y = pairs(task)
    answers, steps = least_squares(x, y), gradient_step(x, y)
    for row in range(3):
        for k in range(7):
            w, *_ = np.linalg.lstsq(x[row, :k], y[row, :k], rcond=None)
            assert answers[row, k] == pytest.approx(w @ x[row, k] if k else 0.0, abs=1e-6)
            if k:  # Gamma of the paper
                gamma = (1 + 1 / k) * np.eye(3) + 3 / k * np.eye(3)
                step = np.linalg.solve(gamma, y[row, :k] @ x[row, :k] / k)
                assert steps[row, k] == pytest.approx(step @ x[row, k], abs=1e-9)
    found = task.baselines("test")
    assert found["zero"] == pytest.approx(1, abs=0.03)
    assert found["least_squares_after_3"] < 1e-8
    for k in (0, 1, 3, 6):
        assert found[f"gradient_step_after_{k}"] == pytest.approx(4 / (k + 4), abs=0.05)
        # The minimum-norm solution knows k of d dimensions.
        assert found[f"least_squares_after_{k}"] == pytest.approx(max(0, 1 - k / 3), abs=0.05)
    noisy = make_task("linear_regression", **options, noise=1.0, sparse=2)
    _, x, y = pairs(noisy)
    found = noisy.baselines("test")
    assert found["zero_after_1"] == pytest.approx(1.5, abs=0.1)
    errors = np.square(gradient_step(x, y, ridge=1.5) - y)[:, 6]
    assert found["gradient_step_after_6"] == pytest.approx(np.mean(errors) / 2, rel=1e-6)
    # No other length of the step is better.
    errors = [np.mean((gradient_step(x, y, ridge=ridge) - y)[:, 4:] ** 2) for ridge in (0.5, 1.5, 3.0)]
    assert errors[1] < min(errors[0], errors[2])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(dims=1), "dims=1; expected at least 2"),
        (dict(sparse=6), "sparse=6 of dims=5 weights; expected at most 5"),
        (dict(measured=(11,)), "measured has 11, but points=11 have at most 10 examples before them"),
        (dict(noise=-1.0), "noise=-1.0; expected"),
        (dict(extrapolate=(0,)), r"extrapolate=\(0,\); expected"),
        (dict(points=0), "points=0; expected"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_task("linear_regression", **options)
