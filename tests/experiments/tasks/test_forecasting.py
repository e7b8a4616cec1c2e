"""Forecasting: files in ETT's format, Informer's splits and scale, windows, the loss and the two baselines."""

import pathlib
import runpy

import numpy as np
import pytest

from experiments import train
from experiments.config.loading import TrainConfig, section, to_plain
from experiments.data import forecasting
from experiments.runs.directory import RunDirectory
from experiments.tasks import make_task
from experiments.training.optimizers import OptimizerConfig

CONFIG = pathlib.Path(__file__).resolve().parents[3] / "configs" / "forecasting" / "ett.py"


def written(path, values, columns=("HUFL", "OT")):
    lines = [",".join(("date", *columns))]
    lines += [f"2016-07-01 {number},{','.join(map(repr, row))}" for number, row in enumerate(values.tolist())]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def values():
    return np.random.default_rng(0).normal(size=(100, 2)) * [3.0, 0.5] + [7.0, -1.0]


@pytest.mark.parametrize(
    "how, given, asked", [("all", [0, 1], [0, 1]), ("one", [1], [1]), ("all_to_one", [0, 1], [1])]
)
def test_windows_of_other_files(tmp_path, values, how, given, asked):
    """70%, 10% and 20% of the rows; windows of later splits begin before them; the scale is that of the training rows."""
    task = make_task(
        "forecasting", file=written(tmp_path / "any.csv", values), values=how, length=6, horizon=3
    )
    scaled = (values - values[:70].mean(0)) / values[:70].std(0)
    for split, first, end in (("train", 0, 70), ("validation", 64, 80), ("test", 74, 100)):
        source = task.splits[split]
        assert len(source) == end - first - 9 + 1
        batch = source.gather(np.arange(len(source))[::-1], 6)
        for place in range(len(source)):
            start = end - 9 - place
            np.testing.assert_allclose(batch["inputs"][place], scaled[start : start + 6, given], rtol=1e-5)
            expected = scaled[start + 6 : start + 9, asked].ravel()
            np.testing.assert_allclose(batch["labels"][place], expected, rtol=1e-5)
    assert (task.input_size, task.num_classes) == (len(given), 3 * len(asked))
    with pytest.raises(ValueError, match="windows of 6 steps are not padded to 8"):
        task.splits["test"].gather(np.array([0]), 8)


@pytest.mark.parametrize("name, rate", [("ETTh2", 1), ("ETTm1", 4)])
def test_official_splits(name, rate):
    """12, 4 and 4 months of 30 days, and rows after them that no split has."""
    months = 30 * 24 * rate
    series = forecasting.Series(name, ("OT",), np.arange(21.0 * months)[:, None])
    found = forecasting.split(series, length=96, horizon=24, inputs=(0,), targets=(0,))
    counts = {split: len(windows) for split, windows in found.items()}
    assert counts == dict(train=12 * months - 119, validation=4 * months - 23, test=4 * months - 23)
    scale = np.arange(12.0 * months).std()
    first = found["test"].gather(np.array([0]), 96)
    np.testing.assert_allclose((first["labels"][0, 0] - first["inputs"][0, -1, 0]) * scale, 1.0, rtol=1e-3)
    with pytest.raises(ValueError, match=f"{name} has {19 * months} rows; its splits need {20 * months}"):
        forecasting.boundaries(series._replace(values=series.values[: 19 * months]))


def test_the_loss_counts_rows_with_weight():
    task = make_task("forecasting", values="one", length=4, horizon=2)
    labels, outputs = np.array([[1.0, 2], [3, 4]], np.float32), np.array([[2.0, 5], [np.nan, 0]], np.float32)
    mean, sums = task.loss(outputs, dict(labels=labels, weight=np.array([1, 0], np.float32)))
    assert {name: float(value) for name, value in sums.items()} == dict(
        loss=5.0, absolute_error=2.0, count=1.0
    )
    assert mean == 5.0


def test_baselines(tmp_path):
    """A line and a sinusoid follow from their past by a linear map, and repeating the last step misses what changes."""
    steps = np.arange(400.0)
    values = np.stack([np.sin(steps / 5), np.cos(steps / 3)], axis=1)
    task = make_task("forecasting", file=written(tmp_path / "waves.csv", values), length=12, horizon=4)
    found = task.baselines("test")
    batch = task.splits["test"].gather(np.arange(len(task.splits["test"])), 12)
    labels = batch["labels"].reshape(-1, 4, 2)
    assert found["last"] == pytest.approx(np.mean((labels - batch["inputs"][:, -1:]) ** 2), rel=1e-5)
    assert found["last"] > 0.2
    assert found["linear"] < 1e-3
    assert task.baselines("train")["linear"] < 1e-3


def test_the_stand_in_has_a_day_and_a_week():
    task = make_task("forecasting", length=168, horizon=24)
    assert task.manifest["parameters"]["series"] == "stand_in"
    assert task.manifest["parameters"]["sha256"].startswith("ab92674a177c")
    baselines = task.baselines("validation")
    assert baselines["linear"] < 0.3 < 1.0 < baselines["last"]
    other = make_task("forecasting", values="one", target="south", length=168, horizon=24)
    assert other.splits["train"].targets == (1,)


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "row 1: ''; expected a header such as date,HUFL,OT"),
        ("2016,1.0,2.0\n", "row 1: '2016,1.0,2.0'; expected a header"),
        ("date,OT,OT\n2016,1.0,2.0\n", "row 1: 'date,OT,OT'; expected names that differ"),
        ("date,HUFL,OT\n2016,1.0,2.0\n2017,1.0\n", "row 3: 2 values; expected 3"),
        ("date,HUFL,OT\n2016,1.0,x\n", "row 2: OT is 'x'; expected a finite number"),
        ("date,HUFL,OT\n2016,nan,1\n", "row 2: HUFL is 'nan'; expected a finite number"),
        ("date,HUFL,OT\n2016,1,1\n", "the split 'train' of series has 0 rows"),
    ],
)
def test_malformed_files_are_refused(tmp_path, text, problem):
    path = tmp_path / "series.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=problem):
        make_task("forecasting", file=str(path), length=2, horizon=2)


@pytest.mark.parametrize(
    "options, problem",
    [
        (dict(file="none.csv"), "task.file='none.csv' is no file; expected a CSV file such as ETTh1.csv"),
        (dict(horizon=0), "task.horizon=0"),
        (dict(values="some"), "task.values='some'; expected all, one or all_to_one"),
        (dict(target="north"), "task.target='north' has no effect with task.values='all'"),
        (dict(values="one", target="OT"), "task.target='OT'; stand_in has north, south, total"),
        (dict(values="one", horizon=1), "task.horizon=1 of one value; expected at least 2 numbers"),
        (dict(length=20000), "the split 'train' of stand_in has 10080 rows"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(options, problem):
    with pytest.raises(ValueError, match=problem):
        make_task("forecasting", **options)


def test_config():
    get_config = runpy.run_path(str(CONFIG))["get_config"]
    config = to_plain(get_config("mixer=lru,values=one,length=48,horizon=12"))
    section(config, "train", TrainConfig), section(config, "optimizer", OptimizerConfig)
    assert config["task"] == dict(name="forecasting", values="one", length=48, horizon=12)
    with pytest.raises(ValueError, match="ett.py takes mixer, .*, not mixr"):
        get_config("mixr=s5")
    with pytest.raises(ValueError, match="width='wide'; expected a number, such as 64"):
        get_config("width=wide")


@pytest.mark.slow
def test_a_model_forecasts_better_than_the_last_step(tmp_path):
    command = [
        f"--config={CONFIG}:mixer=lru,values=one,length=48,horizon=12,width=16,steps=200",
        "--config.train.tensorboard=false",
        "--num_devices=1",
        f"--workdir={tmp_path / 'run'}",
    ]
    assert train.main(command) == 0
    results = RunDirectory(tmp_path / "run").results()
    assert results["test"]["loss"] < 0.5 * results["baselines"]["last"]
