"""Requests to leave."""

import os
import signal
import subprocess
import sys

import pytest

from experiments.runs.interrupts import Stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_a_request(number, capsys):
    before = signal.getsignal(number)
    with Stop() as stop:
        assert stop.reason is None
        os.kill(os.getpid(), number)
        assert stop.reason == signal.Signals(number).name
    assert signal.getsignal(number) is before
    assert "once more ends at once" in capsys.readouterr().err


def test_a_second_signal_ends_the_process():
    code = (
        "import os, signal; from experiments.runs.interrupts import Stop\n"
        "with Stop():\n"
        "  for _ in range(2): os.kill(os.getpid(), signal.SIGTERM)\n"
        "  print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM
    assert "still here" not in done.stdout


def test_with_nothing_to_save_the_first_signal_ends_the_process():
    code = (
        "import os, signal, threading, time; from experiments.runs.interrupts import Stop\n"
        "with Stop() as stop:\n"
        "  stop.nothing_to_save = True\n"
        "  thread = threading.Thread(target=time.sleep, args=(60,)); thread.start()\n"
        "  os.kill(os.getpid(), signal.SIGTERM); thread.join()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 75
    assert "Left at once because of SIGTERM" in done.stderr


def test_a_time_limit_is_a_request(monkeypatch):
    now = [50.0]
    monkeypatch.setattr("experiments.runs.interrupts.time.monotonic", lambda: now[0])
    stop = Stop(after_seconds=10)
    now[0] = 59.9
    assert stop.reason is None
    now[0] = 60.0
    assert stop.reason == "the time limit"


def test_an_impossible_limit_is_refused():
    with pytest.raises(ValueError, match="stop_after_seconds=0"):
        Stop(after_seconds=0)
