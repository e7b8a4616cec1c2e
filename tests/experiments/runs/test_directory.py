"""The folder of a run."""

import json

import pytest

from experiments.runs.directory import RunDirectory, WorkdirError, git_revision, versions
from tests.experiments.tiny import tiny_config

MANIFEST = {"name": "tiny", "sha": "1"}


def begin(folder, config=None, manifest=None):
    config = config or tiny_config()
    run = RunDirectory.open(folder, config)
    run.begin(config, manifest or MANIFEST, "table")
    return run


def test_a_run_can_be_opened_again_and_moved(tmp_path):
    begin(tmp_path / "a").release()
    (tmp_path / "a").rename(tmp_path / "b")
    begin(tmp_path / "b")
    assert RunDirectory(tmp_path / "b").config() == tiny_config()
    assert json.loads((tmp_path / "b" / "manifest.json").read_text()) == MANIFEST
    assert (tmp_path / "b" / "parameters.txt").read_text() == "table\n"


def test_another_config_is_refused_and_named(tmp_path):
    begin(tmp_path).release()
    with pytest.raises(WorkdirError, match=r"config.train.batch_size: 8 in the run, 16 given"):
        RunDirectory.open(tmp_path, tiny_config(train=dict(batch_size=16)))


def test_other_data_are_refused_and_named(tmp_path):
    begin(tmp_path).release()
    with pytest.raises(WorkdirError, match="other data: sha differ"):
        begin(tmp_path, manifest={"name": "tiny", "sha": "2"})


def test_a_config_that_failed_leaves_no_run(tmp_path):
    RunDirectory.open(tmp_path, tiny_config()).release()
    begin(tmp_path, tiny_config(seed=1))


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(WorkdirError, match=r"not empty \(thesis.tex\) and holds no run"):
        RunDirectory.open(tmp_path, tiny_config())
    with pytest.raises(WorkdirError, match=r"holds no run: there is no config.json"):
        RunDirectory(tmp_path).config()


def test_a_run_is_trained_by_one_at_a_time(tmp_path):
    run = begin(tmp_path)
    with pytest.raises(WorkdirError, match="another process is training this run"):
        begin(tmp_path)
    run.release()
    begin(tmp_path)


def test_every_start_is_recorded(tmp_path):
    run = begin(tmp_path)
    run.add_session(step=0, devices="1 x cpu")
    run.add_session(step=7, devices="1 x cpu")
    first, second = map(json.loads, (tmp_path / "sessions.jsonl").read_text().splitlines())
    assert (first["step"], second["step"]) == (0, 7)
    assert first["versions"] == versions()
    assert first["versions"]["jax"]
    assert first["git"] == git_revision()


def test_results_mark_the_end(tmp_path):
    run = begin(tmp_path)
    assert run.results() is None
    run.write_results({"test": {"accuracy": 0.5}})
    assert run.results() == {"test": {"accuracy": 0.5}}
