"""Evaluation from a run's directory, and comparison of runs."""

import errno
import json
import shutil

import pytest

from experiments import compare, evaluate
from experiments.data import cache
from experiments.data.sequences import Sequences
from experiments.parallel.mesh import Devices
from experiments.runs import results as run_results
from experiments.runs.directory import RunDirectory
from experiments.runs.interrupts import Stop
from experiments.training import experiment, loop
from tests.experiments.tiny import build_tiny_model, make_tiny_task, tiny_config


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(experiment, "make_task", make_tiny_task)
    monkeypatch.setattr(experiment, "build_model", build_tiny_model)


def train(folder, **sections):
    config = tiny_config(**sections)
    plan = experiment.build(config)
    run = RunDirectory.open(folder, config)
    run.begin(config, plan.task.manifest, plan.groups_table)
    devices = Devices.first(1)
    outcome = loop.train(plan, run, devices=devices, stop=Stop())
    run.write_results(run_results.summarize(plan, outcome, devices))
    run.release()
    return outcome


def call(folder, *arguments):
    return evaluate.main([f"--workdir={folder}", "--num_devices=1", *arguments])


def test_a_run_directory_is_enough_to_evaluate(tmp_path, capsys):
    outcome = train(tmp_path, train=dict(epochs=2))
    capsys.readouterr()
    assert call(tmp_path) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / f"evaluation-test-{outcome.best_step}.json").read_text())
    assert printed["loss"] == outcome.test["loss"]
    assert call(tmp_path, "--split=validation", "--checkpoint=last") == 0
    assert json.loads(capsys.readouterr().out)["step"] == 12
    for bad, message in (
        ("--checkpoint=11", "no such checkpoint; steps with one: "),
        ("--checkpoint=first", "expected best, last or a step"),
        ("--split=tset", "no split 'tset'; it has train, validation, test"),
    ):
        assert call(tmp_path, bad) == 2
        assert message in capsys.readouterr().err


def test_evaluation_needs_no_place_to_write_and_makes_no_folder(tmp_path, capsys, monkeypatch):
    outcome = train(tmp_path, train=dict(epochs=1))
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()

    def fail(path, text):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(evaluate, "write_atomically", fail)
    assert call(tmp_path) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["loss"] == outcome.test["loss"]
    assert f"evaluation-test-{outcome.best_step}.json cannot be written: Permission denied" in err
    assert sorted(tmp_path.rglob("*")) == before
    shutil.rmtree(tmp_path / "checkpoints")
    assert call(tmp_path) == 2
    assert not (tmp_path / "checkpoints").exists()


def test_data_that_a_config_names_are_not_written(tmp_path):
    recipe = cache.Recipe("x", 1, {}, ("a",), "build")
    rows = Sequences.from_records([(b"\x00", 0)], dtype="uint8")
    elsewhere = tmp_path / "elsewhere"
    with cache.temporary_builds():
        folder = cache.load_or_build(recipe, lambda: {"train": rows}, data_dir=elsewhere).folder
        assert folder.exists()
    assert not folder.exists()
    assert not elsewhere.exists()
    kept = cache.load_or_build(recipe, lambda: {"train": rows}, data_dir=elsewhere).folder
    with cache.temporary_builds():  # what is there is read there
        assert cache.load_or_build(recipe, None, data_dir=elsewhere).folder == kept


def test_damaged_checkpoints_are_not_evaluated(tmp_path, capsys):
    train(tmp_path, train=dict(epochs=2, keep_last=3))
    flip(tmp_path / "checkpoints" / "12")
    assert call(tmp_path, "--checkpoint=last") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["step"] == 8
    assert "The checkpoint of step 12 is damaged and left out: the content of " in err
    assert call(tmp_path, "--checkpoint=12") == 2
    assert "checkpoint=12: it is damaged; steps with other checkpoints: 6, 8" in capsys.readouterr().err


def flip(checkpoint):
    file = max(checkpoint.rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def test_metrics_that_are_not_finite_are_null(tmp_path, capsys, monkeypatch):
    outcome = train(tmp_path, task=dict(poison_validation=True), train=dict(epochs=1))
    text = (tmp_path / "results.json").read_text() + (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    results = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["validation"]["loss"] is outcome.validation["loss"] is None
    assert "loss not finite" in run_results.describe(results)
    assert "validation at step 6 is not finite: loss nan" in capsys.readouterr().err
    assert call(tmp_path, "--split=validation") == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["loss"] is None
    assert "not finite" in compare.table("m", {"a": dict(value=None, seconds=1, parameters=1)}, {})


def test_a_folder_without_a_run_is_refused_and_left_alone(tmp_path, capsys):
    assert call(tmp_path / "none") == 2
    assert "holds no run" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_an_argument_is_added_to_the_config():
    assert compare.with_argument("a.py", "mixer=s5") == "a.py:mixer=s5"
    assert compare.with_argument("a.py:size=2", "mixer=s5") == "a.py:size=2,mixer=s5"


@pytest.fixture
def runs(monkeypatch):
    """Stands in for the processes of training; records what they are asked, and leaves with the codes given."""
    asked, codes = [], []

    def run_training(arguments):
        asked.append(arguments)
        folder = arguments[1].removeprefix("--workdir=")
        code = codes.pop(0)
        if not code and "--check" not in arguments:
            train(folder, seed=len(asked), train=dict(epochs=1, checkpoint_every=None))
        return code

    monkeypatch.setattr(compare, "run_training", run_training)
    return asked, codes


def test_runs_are_compared(tmp_path, capsys, runs):
    asked, codes = runs
    codes[:] = [0] * 4
    flags = [f"--workdir={tmp_path}", "--config=c.py:size=1", "--mixers=one,two", "--config.train.epochs=1"]
    assert compare.main(flags) == 0
    flags = [
        [f"--config=c.py:size=1,mixer={name}", f"--workdir={tmp_path / name}", "--config.train.epochs=1"]
        for name in ("one", "two")
    ]
    assert asked == [*([*each, "--check"] for each in flags), *flags]
    record = json.loads((tmp_path / "compare.json").read_text())
    printed = capsys.readouterr().out
    assert record["split"] == "test"
    for name in ("one", "two"):
        result = RunDirectory(tmp_path / name).results()
        assert record["runs"][name]["value"] == result["test"]["accuracy"]
        assert f"{result['test']['accuracy']:.4f}" in printed
    assert f"{record['baselines']['majority']:.4f}" in printed
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_nothing_is_trained_before_every_mixer_is_checked(tmp_path, runs, capsys):
    asked, codes = runs
    codes[:] = [0, 2]
    assert compare.main([f"--workdir={tmp_path / 'w'}", "--config=c.py", "--mixers=one,tow"]) == 2
    assert [arguments[-1] for arguments in asked] == ["--check", "--check"]
    assert not (tmp_path / "w").exists()
    assert compare.main([f"--workdir={tmp_path / 'w'}", "--config=c.py", "--mixers=,"]) == 2
    assert "--mixers=,: a name is empty" in capsys.readouterr().err


def test_a_comparison_leaves_with_the_code_of_a_run_that_did(tmp_path, runs):
    asked, codes = runs
    codes[:] = [0, 0, 75]
    assert compare.main([f"--workdir={tmp_path}", "--config=c.py", "--mixers=one,two"]) == 75
    assert len(asked) == 3
    assert not (tmp_path / "compare.json").exists()
