"""JSON lines, event files and missing packages."""

import json
import sys
import time
import types

import pytest

from experiments.runs import logs as logs_module
from experiments.runs.logs import Logs, MetricsFile, cut_after, elapsing, read_lines


def open_logs(folder, *, after_step=0, tensorboard=False, wandb=None):
    return Logs(folder, after_step=after_step, config={}, tensorboard=tensorboard, wandb=wandb)


def write_steps(folder, steps, *, after_step=0, **options):
    with open_logs(folder, after_step=after_step, **options) as logs:
        for step in steps:
            logs.write("train", step, {"loss": step / 3})


def test_going_on_repeats_no_line_and_leaves_none_of_later_steps(tmp_path):
    write_steps(tmp_path, range(1, 8))
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    write_steps(tmp_path, range(5, 8), after_step=4)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == before
    assert not list(tmp_path.glob(".*"))  # the temporary file is gone


def test_a_line_cut_short_by_a_crash_is_dropped(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1, "loss": 2.0}\n{"kind": "train", "st')
    assert [line["step"] for line in read_lines(path)] == [1]
    assert "metrics.jsonl, line 2: the line is cut or damaged" in capsys.readouterr().err
    cut_after(path, 5)
    assert [line["step"] for line in read_lines(path)] == [1]
    assert path.read_text().endswith("}\n")


def test_lost_and_changed_lines_are_said(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    with open_logs(tmp_path) as logs:
        for step in range(1, 6):
            logs.write("train", step, {"loss": step / 3})
        seal = logs.seal
        logs.write("train", 6, {"loss": 2.0})
    MetricsFile(path, after_step=5, seal=seal).close()
    assert capsys.readouterr().err == ""
    whole = path.read_text().splitlines(keepends=True)
    changes = {
        "1 of 5 lines": [whole[0], *whole[2:]],
        "2 of 5 lines": [*whole[:3], whole[3][:9]],
        "some lines": [*whole[:4], whole[4].replace("1.6", "1.7")],
    }
    for what, lines in changes.items():
        path.write_text("".join(lines))
        MetricsFile(path, after_step=5, seal=seal).close()
        err = capsys.readouterr().err
        assert f"{path}: {what} up to step 5 are lost or changed" in err
        assert err.count("\n") == 1
        assert (f"{path}, line 4: the line is cut or damaged" in err) == (what == "2 of 5 lines")
    path.write_bytes(b'5\n{}\n{"kind": "train", "step": null}\n\xff\n' + whole[0].encode())
    assert [line["step"] for line in read_lines(path)] == [1]


def test_a_bar_shows_that_time_passes(monkeypatch):
    monkeypatch.setattr(logs_module.sys.stderr, "isatty", lambda: True, raising=False)
    shown = []
    bar = types.SimpleNamespace(set_description=shown.append)
    with elapsing(bar, "compiling"):
        time.sleep(1.3)
    assert shown == ["compiling", "compiling for 1 s"]


def test_lines_of_tests_are_written_anew(tmp_path):
    write_steps(tmp_path, [1])
    with open_logs(tmp_path, after_step=1) as logs:
        logs.write("test", 1, {"loss": 1.0})
    with open_logs(tmp_path, after_step=1):
        assert [line["kind"] for line in read_lines(tmp_path / "metrics.jsonl")] == ["train"]


def test_every_line_is_json(tmp_path):
    log = MetricsFile(tmp_path / "m", after_step=0)
    log.write("validation", 1, {"loss": float("nan"), "epoch": 0.5})
    log.close()
    text = (tmp_path / "m").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "kind": "validation",
        "step": 1,
        "loss": None,
        "epoch": 0.5,
    }


def test_tensorboard_files_are_written(tmp_path):
    write_steps(tmp_path, [1, 2], tensorboard=True)
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in file.read_bytes()


@pytest.mark.parametrize(
    "package, options", [("tensorboardX", dict(tensorboard=True)), ("wandb", dict(wandb="project"))]
)
def test_a_missing_package_is_named_and_training_goes_on(tmp_path, monkeypatch, capsys, package, options):
    monkeypatch.setitem(sys.modules, package, None)
    write_steps(tmp_path, [1], **options)
    assert f"pip install {package}" in capsys.readouterr().err
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 1


def test_a_run_at_wandb_is_the_same_after_every_start(tmp_path, monkeypatch, capsys):
    started, logged = [], []

    class Run:
        id = "abc"

        def log(self, values, step):
            logged.append((step, values))

        def finish(self):
            logged.append("finished")

    def init(**options):
        started.append((options["project"], options["id"]))
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    write_steps(tmp_path, [1], wandb="project")
    write_steps(tmp_path, [2], after_step=1, wandb="project")
    assert started == [("project", None), ("project", "abc")]
    assert logged == [(1, {"train/loss": 1 / 3}), "finished", (2, {"train/loss": 2 / 3}), "finished"]
    (tmp_path / "wandb-id.txt").write_text("abd\n")
    write_steps(tmp_path, [3], after_step=2, wandb="project")
    assert started[2] == ("project", None)
    assert "wandb-id.txt is not what was written" in capsys.readouterr().err
