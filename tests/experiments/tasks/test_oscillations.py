"""Oscillations at irregular times: what is drawn, the loss, and that the times between observations matter."""

import numpy as np
import pytest

from experiments import train
from experiments.data import oscillations
from experiments.runs.directory import RunDirectory
from experiments.tasks import make_task


def test_signals_are_what_their_parameters_say():
    task = make_task("oscillations", length=40, train=500, seed=2)
    source = task.splits["train"]
    batch = source.gather(np.arange(500), 40)
    assert (batch["inputs"].shape, batch["intervals"].shape, batch["labels"].shape) == (
        (500, 40, 1),
        (500, 40),
        (500, 2),
    )
    np.testing.assert_allclose(batch["labels"].mean(0), 0, atol=0.15)
    np.testing.assert_allclose(batch["labels"].std(0), 1, atol=0.1)
    # The phase is the only unknown: the best cosine and sine of the given frequency and damping leave the noise.
    frequency, damping = (
        low + (high - low) * (label / np.sqrt(12) + 0.5)
        for (low, high), label in zip(
            (oscillations.FREQUENCY, oscillations.DAMPING), batch["labels"].T, strict=True
        )
    )
    for row in range(20):
        times = np.cumsum(batch["intervals"][row])
        basis = np.exp(-damping[row] * times) * np.stack(
            [np.cos(frequency[row] * times), np.sin(frequency[row] * times)]
        )
        weights, *_ = np.linalg.lstsq(basis.T, batch["inputs"][row, :, 0], rcond=None)
        residual = batch["inputs"][row, :, 0] - basis.T @ weights
        assert residual.std() == pytest.approx(oscillations.NOISE, rel=0.35)
        assert np.hypot(*weights) == pytest.approx(1, abs=0.1)
    gaps = batch["intervals"].mean(axis=1)
    assert gaps.min() < 0.35 < 0.8 < gaps.max()


def test_splits_differ_and_do_not_depend_on_their_sizes():
    small, large = (make_task("oscillations", train=count, length=8) for count in (3, 9))
    np.testing.assert_array_equal(small.splits["train"].values, large.splits["train"].values[:3])
    assert not np.array_equal(large.splits["train"].values[0], large.splits["test"].values[0])
    assert large.baselines("test")["mean"] == pytest.approx(1, abs=0.3)


def test_ways_to_give_the_intervals():
    batches = {
        gaps: make_task("oscillations", gaps=gaps, length=8).splits["test"].gather(np.array([1, 0]), 8)
        for gaps in ("steps", "feature", "none")
    }
    np.testing.assert_array_equal(batches["feature"]["inputs"][..., 1], batches["steps"]["intervals"])
    assert "intervals" not in batches["feature"]
    assert batches["none"]["inputs"].shape == (2, 8, 1)
    assert [make_task("oscillations", gaps=gaps).input_size for gaps in batches] == [1, 2, 1]


def test_the_loss_is_the_mean_squared_error_of_rows_with_weight():
    task = make_task("oscillations")
    labels, outputs = (
        np.array([[1.0, 2], [3, 4], [5, 6]], np.float32),
        np.array([[2.0, 2], [3, 1], [np.nan, 9]]),
    )
    batch = dict(labels=labels, weight=np.array([1, 1, 0], np.float32))
    mean, sums = task.loss(outputs.astype(np.float32), batch)
    assert {name: float(value) for name, value in sums.items()} == dict(
        loss=5.0, frequency=1.0, damping=9.0, count=2.0
    )
    assert mean == 2.5


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(gaps="step"), "task.gaps='step' is unknown; choose from steps, feature, none"),
        (dict(length=0), "task.length=0"),
        (dict(train=0), "task.train=0"),
        (dict(seed=-1), "task.seed=-1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_task("oscillations", **options)


def test_a_mixer_without_intervals_is_refused_before_training(tmp_path, capsys):
    config = "--config=configs/synthetic/oscillations.py:mixer=gla"
    assert train.main([config, f"--workdir={tmp_path / 'run'}"]) == 2
    assert "GLA takes no intervals between tokens here" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)  # S4D, on a machine that is busy
@pytest.mark.parametrize("mixer", ["s5", "s4d"])
def test_the_times_between_observations_matter(mixer, tmp_path):
    losses = {}
    for gaps in ("steps", "none"):
        workdir = tmp_path / gaps
        command = [
            f"--config=configs/synthetic/oscillations.py:mixer={mixer},gaps={gaps},steps=800,width=12",
            "--config.model.mixer_defaults.state_size=8",  # S4D computes width * state_size / 2 exponentials a token
            "--config.task.length=24",
            "--config.task.train=4000",
            "--config.train.batch_size=32",
            "--num_devices=1",
            "--config.train.tensorboard=false",
            f"--workdir={workdir}",
        ]
        assert train.main(command) == 0
        losses[gaps] = RunDirectory(workdir).results()["test"]["loss"]
    assert losses["steps"] < 0.7 * losses["none"]
