"""The folder of a run."""

import errno
import json

import pytest

from experiments.runs import directory, manifests, sessions, trusted
from experiments.runs.directory import RunDirectory, WorkdirError
from experiments.runs.files import DamagedFileError
from experiments.runs.sessions import git_revision, versions
from tests.experiments.tiny import tiny_config

MANIFEST = {"name": "tiny", "sha": "1"}


def begin(folder, config=None, manifest=None, *, step=None):
    """A begun run, with the folder of a checkpoint if a step is given."""
    config = config or tiny_config()
    run = RunDirectory.open(folder, config)
    run.begin(config, manifest or MANIFEST, "table")
    if step is not None:
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
    return run


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_run_can_be_opened_again_and_moved(tmp_path):
    begin(tmp_path / "a").release()
    (tmp_path / "a").rename(tmp_path / "b")
    begin(tmp_path / "b")
    assert RunDirectory(tmp_path / "b").config() == tiny_config()
    assert json.loads((tmp_path / "b" / "manifest.json").read_text()) == MANIFEST
    assert (tmp_path / "b" / "parameters.txt").read_text() == "table\n"


def test_another_config_is_refused_and_named(tmp_path):
    begin(tmp_path, step=4).release()
    with pytest.raises(WorkdirError, match=r"config.train.batch_size: 8 in the run, 16 given"):
        RunDirectory.open(tmp_path, tiny_config(train=dict(batch_size=16)))


def test_other_data_are_refused_and_named(tmp_path):
    begin(tmp_path, step=4).release()
    with pytest.raises(WorkdirError, match="other data: sha differ"):
        begin(tmp_path, manifest={"name": "tiny", "sha": "2"})


def test_a_run_without_a_step_gives_way_to_another(tmp_path):
    begin(tmp_path).release()
    other = tiny_config(seed=1)
    begin(tmp_path, other, {"name": "tiny", "sha": "2"})
    assert RunDirectory(tmp_path).config() == other
    assert json.loads((tmp_path / "manifest.json").read_text())["sha"] == "2"


def test_more_steps_are_taken_where_the_experiment_allows_them(tmp_path):
    begin(tmp_path, step=4).release()
    (tmp_path / "results.json").write_text("{}")
    longer = tiny_config(train=dict(epochs=9))
    with pytest.raises(WorkdirError, match=r"no: 4(.|\n)*config.train.epochs: 4 in the run, 9 given"):
        RunDirectory.open(tmp_path, longer, lambda run, newest: f"no: {newest}")
    assert RunDirectory(tmp_path).results_of(tiny_config()) == {}
    assert RunDirectory(tmp_path).results_of(longer) is None
    run = RunDirectory.open(tmp_path, longer, lambda run, newest: None)
    run.begin(longer, MANIFEST, "table")
    assert RunDirectory(tmp_path).config() == longer
    assert RunDirectory(tmp_path).results() is None


def test_what_is_refused_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(WorkdirError, match=f"{tmp_path / 'file'} is a file; give a folder"):
            begin(folder)
    monkeypatch.setattr(directory.fcntl, "flock", fail)
    with pytest.raises(WorkdirError):
        begin(tmp_path / "a" / "b")
    monkeypatch.undo()
    for module in (trusted, manifests):
        monkeypatch.setattr(module, "write_atomically", fail)
        with pytest.raises(OSError, match="No space"):
            begin(tmp_path / "a" / "b")
        assert tree(tmp_path) == ["file"]
        monkeypatch.undo()


def fail(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("config.json", '{\n "seed": 0,\n "tas', r"config.json, line 3: .* the file is damaged"),
        ("config.json", "[]", "config.json, line 1: expected an object"),
        ("config.json", "null", "config.json, line 1: expected an object"),
        ("config.json", "{}", "config.json is no config of a run"),
        ("config.json", b"\xff", "config.json: byte 0 is not UTF-8"),
        ("manifest.json", "{", "manifest.json, line 1"),
        ("results.json", '{"steps": 4,\n', "results.json, line 2: .*; delete it"),
        ("results.json", "[4]", "results.json, line 1: expected an object.*; delete it"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, text, message):
    begin(tmp_path, step=4).release()
    (tmp_path / manifests.NAME).unlink()  # as in versions up to 0.2.0
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DamagedFileError, match=message):
        RunDirectory(tmp_path).results_of(tiny_config())
        begin(tmp_path)


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


def test_other_conditions_are_said(tmp_path, capsys, monkeypatch):
    run = begin(tmp_path)
    assert run.add_session(step=0, devices="1 x cpu") is None
    assert run.add_session(step=7, devices="1 x cpu") is None
    file = tmp_path / "sessions.jsonl"
    file.write_text(file.read_text() + '{"cut')
    jax = versions()["jax"]
    monkeypatch.setattr(sessions, "versions", lambda: versions() | {"jax": "99"})
    change = run.add_session(step=9, devices="1 x H100")
    assert f"jax {jax} then, 99 now; 1 x cpu then, 1 x H100 now" in change
    assert "sessions.jsonl, line 3: the line is cut or damaged" in capsys.readouterr().err
    assert json.loads(file.read_text().splitlines()[3])["step"] == 9


def test_results_mark_the_end(tmp_path):
    run = begin(tmp_path)
    assert run.results() is None
    run.write_results({"test": {"accuracy": 0.5, "loss": float("nan")}})
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"test": {"accuracy": 0.5, "loss": None}}
    assert run.results() == {"test": {"accuracy": 0.5, "loss": None}}
