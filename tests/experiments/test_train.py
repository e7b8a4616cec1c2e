"""The command `experiments.train` in processes of its own: kills, signals, exit codes and refusals."""

import errno
import json
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments import train
from experiments.config.command_line import EXIT_DIVERGED, EXIT_INTERRUPTED, EXIT_REFUSED
from experiments.runs import logs
from experiments.runs.checkpoints import Checkpoints
from experiments.runs.directory import RunDirectory
from experiments.runs.logs import read_lines
from experiments.training import experiment, loop
from tests.experiments import tiny

TIMED = {"seconds", "tokens_per_second"}
PATIENCE = 120.0
# Seconds to make a batch in runs that are killed, so that the moment can be hit.
SLOW = "--config.task.slow=0.08"


def command(workdir, *flags):
    return [
        *(sys.executable, "-m", "tests.experiments.tiny", "--config=tests/experiments/tiny_config.py"),
        *(f"--workdir={workdir}", "--num_devices=1", *flags),
    ]


def run(workdir, *flags):
    return subprocess.run(command(workdir, *flags), capture_output=True, text=True)


def run_until(workdir, condition, number):
    """Starts the command, sends it a signal as soon as the condition holds, and returns its exit code."""
    process = subprocess.Popen(
        command(workdir, SLOW), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + PATIENCE
    try:
        while not condition():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(number)
        process.wait(PATIENCE)
    finally:
        process.kill()
        process.communicate()
    return process.returncode


def lines(workdir, kind):
    return [line for line in read_lines(workdir / "metrics.jsonl") if line["kind"] == kind]


def unfinished(workdir):
    return list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"))


def untimed(line):
    return {name: value for name, value in line.items() if name not in TIMED}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    done = run(workdir)
    assert done.returncode == 0, done.stderr
    return workdir


def test_a_finished_run_holds_all_that_is_needed(whole):
    results = RunDirectory(whole).results()
    assert results["steps"] == 24
    assert results["test"]["accuracy"] >= results["baselines"]["majority"]
    assert results["config"]["train"]["epochs"] == 4
    assert results["parameters"] == 39
    for field in ("training_seconds", "compile_seconds", "tokens_per_second"):
        assert results[field] > 0
    for field in ("versions", "git", "manifest_sha256", "devices"):
        assert results[field]
    assert (whole / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert [line["step"] for line in lines(whole, "train")] == list(range(1, 25))


@pytest.mark.slow
def test_kills_at_any_moment_change_nothing(whole, tmp_path):
    workdir = tmp_path / "killed and resumed"  # a space in the path, too

    def steps_logged(count):
        return lambda: (
            len(lines(workdir, "train")) >= count if (workdir / "metrics.jsonl").exists() else False
        )

    # Before the first checkpoint.
    assert run_until(workdir, steps_logged(2), signal.SIGKILL) == -signal.SIGKILL
    assert not any((workdir / "checkpoints").iterdir())
    # Inside the writing of a checkpoint.
    assert run_until(workdir, lambda: unfinished(workdir), signal.SIGKILL) == -signal.SIGKILL
    assert unfinished(workdir)
    # Between an evaluation and its checkpoint.
    assert run_until(workdir, lambda: lines(workdir, "validation"), signal.SIGKILL) == -signal.SIGKILL
    # Asked to leave, in another place.
    moved = tmp_path / "moved"
    shutil.move(workdir, moved)
    workdir = moved
    assert run_until(workdir, steps_logged(10), signal.SIGTERM) == EXIT_INTERRUPTED
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        assert checkpoints.latest == lines(workdir, "train")[-1]["step"] < 24
    assert RunDirectory(workdir).results() is None

    done = run(workdir, SLOW)
    assert done.returncode == 0, done.stderr
    for kind in ("train", "validation", "test"):
        assert list(map(untimed, lines(workdir, kind))) == list(map(untimed, lines(whole, kind)))
    last = []
    for folder in (whole, workdir):
        with Checkpoints(folder / "checkpoints") as checkpoints:
            last.append(checkpoints.load(24)[0])
    jax.tree.map(np.testing.assert_array_equal, *last)
    sessions = [json.loads(line)["step"] for line in (workdir / "sessions.jsonl").read_text().splitlines()]
    assert sessions == sorted(sessions)
    assert len(sessions) == 5


@pytest.mark.slow
@pytest.mark.timeout(900)  # where other processes take the cores
@pytest.mark.parametrize("task, kills", [("tiny", 40), ("language", 10)])
def test_kills_change_no_number(tmp_path, task, kills):
    """At random operations on files and at random times; see `tests.experiments.killed`."""
    options = [f"--folder={tmp_path}", f"--kills={kills}", f"--task={task}"]
    command = [sys.executable, "-m", "tests.experiments.killed", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout)
    assert summary["kills"] == kills
    assert summary["runs"] >= 1
    assert summary["wrong"] == []


@pytest.mark.slow
def test_a_lost_terminal_saves_and_a_signal_during_compilation_leaves_at_once(tmp_path):
    workdir = tmp_path / "run"
    sessions = workdir / "sessions.jsonl"
    assert run_until(workdir, sessions.exists, signal.SIGTERM) == EXIT_INTERRUPTED  # the session is compiling
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        assert checkpoints.steps == []
    assert run_until(workdir, lambda: lines(workdir, "train"), signal.SIGHUP) == EXIT_INTERRUPTED
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        assert checkpoints.latest == lines(workdir, "train")[-1]["step"]


@pytest.fixture
def in_process(monkeypatch):
    """The command in this process, for refusals."""
    monkeypatch.setattr(experiment, "make_task", tiny.make_tiny_task)
    monkeypatch.setattr(experiment, "build_model", tiny.build_tiny_model)
    return lambda workdir, *flags: train.main(
        ["--config=tests/experiments/tiny_config.py", f"--workdir={workdir}", "--num_devices=1", *flags]
    )


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--config.data.bucket_bounds=(8,4)", "bucket_bounds must be positive and increase"),
        ("--config.data.bucket_bounds=(4,5)", "make that bound"),
        ("--config.train.batch_size=100", "batch_size=100 is larger than the data set"),
        ("--config.optimizer.warmup_steps=24", "the warm-up of 24 steps is not shorter"),
        ("--config.mesh.tensor=3", "mesh: tensor=3 takes 3 devices"),
        ("--num_devices=99", "num_devices=99; JAX sees"),
    ],
)
def test_a_refused_command_leaves_nothing_behind(tmp_path, in_process, capsys, flag, message):
    assert in_process(tmp_path / "a" / "b", flag) == EXIT_REFUSED
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_what_is_only_checked_leaves_nothing_either(tmp_path, in_process, capsys):
    assert in_process(tmp_path / "run", "--check") == 0
    assert "39 parameters; nothing is refused" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be_used_are_refused_in_two_lines(tmp_path, in_process, capsys, monkeypatch):
    (tmp_path / "file").touch()
    assert in_process(tmp_path / "file") == EXIT_REFUSED
    err = capsys.readouterr().err
    assert "is a file; give a folder" in err
    assert err.count("\n") == 2

    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(logs, "write_atomically", full)
    assert in_process(tmp_path / "run") == EXIT_REFUSED
    err = capsys.readouterr().err
    assert f"No space left on device: '{tmp_path / 'run' / 'metrics.jsonl'}'" in err
    assert err.count("\n") == 2


def test_too_little_memory_is_said_with_what_takes_less(tmp_path, in_process, capsys, monkeypatch):
    def exhausted(*_args, **_options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nDetails")

    monkeypatch.setattr(loop, "train", exhausted)
    assert in_process(tmp_path / "run") == EXIT_REFUSED
    err = capsys.readouterr().err
    assert (
        "has too little memory for this config: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes." in err
    )
    assert "train.batch_size" in err
    assert err.count("\n") == 2


def test_a_finished_run_is_shown_and_another_config_refused(whole):
    again = run(whole)
    assert again.returncode == 0
    assert "is finished" in again.stdout
    assert len(lines(whole, "train")) == 24
    other = run(whole, "--config.train.batch_size=16", "--config.optimizer.ema=0.5")
    assert other.returncode == EXIT_REFUSED
    assert "config.train.batch_size: 8 in the run, 16 given" in other.stderr
    assert "config.optimizer.ema: 0.9 in the run, 0.5 given" in other.stderr
    assert "Traceback" not in other.stderr


def test_a_loss_that_is_not_finite_has_its_own_exit_code(tmp_path):
    done = run(tmp_path / "run", "--config.optimizer.learning_rate=1e38")
    assert done.returncode == EXIT_DIVERGED, done.stderr
    assert "not finite at step " in done.stderr
    assert "Traceback" not in done.stderr


def test_mistakes_are_named_before_any_compute(tmp_path):
    unknown = run(tmp_path / "a", "--config.train.bach_size=4")
    assert unknown.returncode == EXIT_REFUSED
    assert "did you mean 'batch_size'" in unknown.stderr
    assert "Traceback" not in unknown.stderr
    impossible = run(tmp_path / "b", "--config.train.epochs=-4")
    assert impossible.returncode == EXIT_REFUSED
    assert "train.epochs=-4; expected at least 1" in impossible.stderr
    assert not (tmp_path / "b" / "config.json").exists()
