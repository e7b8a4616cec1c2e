"""Processes of trainings: their variables, logs and exit codes, and the signals that reach them."""

import os
import signal
import sys

import pytest

from experiments.runs.trainings import Trainings

# Stands for Python: says its arguments and a variable, and ends by SIGTERM, or with the code that its last argument is.
SCRIPT = """#!/bin/sh
trap 'kill $!; echo saved; exit 75' TERM
echo "$*" "$OF_THE_RUN"
case $4 in wait) sleep 60 & wait ;; *) exit $4 ;; esac
"""


@pytest.fixture(autouse=True)
def program(tmp_path, monkeypatch):
    file = tmp_path / "python"
    file.write_text(SCRIPT)
    file.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(file))


def wait_for(log, text):
    while not log.exists() or text not in log.read_text():
        pass


def test_runs_go_on_at_the_same_time(tmp_path):
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    before = signal.getsignal(signal.SIGTERM)
    with Trainings() as trainings:
        trainings.start(0, ["--a", "wait"], {"OF_THE_RUN": "x"}, logs[0])
        trainings.start(1, ["--b", "65"], None, logs[1])
        assert trainings.ended() == (1, 65)
        assert len(trainings) == 1
        wait_for(logs[0], "x")
        os.kill(os.getpid(), signal.SIGTERM)
        assert trainings.signalled
        assert trainings.ended() == (0, 75)
    assert logs[0].read_text() == "-m experiments.train --a wait x\nsaved\n"
    assert logs[1].read_text() == "-m experiments.train --b 65 \n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_error_ends_the_runs(tmp_path):
    log = tmp_path / "a.log"
    with pytest.raises(OSError, match="full"), Trainings() as trainings:
        trainings.start(0, ["--a", "wait"], None, log)
        wait_for(log, "wait")
        raise OSError("full")
    assert log.read_text().endswith("saved\n")
