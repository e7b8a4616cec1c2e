"""Two processes of four emulated devices each train one run, one after the other lost, resumed on other devices."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.parallel import hosts
from experiments.runs.logs import read_lines

ROOT = Path(__file__).resolve().parents[3]
CONFIG = """
from ml_collections import config_dict

def get_config():
    return config_dict.ConfigDict(dict(
        seed=0,
        task=dict(name="parity", running=True, lengths=(4, 12), train=64, validation=16, test=16),
        model=dict(kind="language_model", width=64, depth=2, pattern=("attention",), mixers=dict(attention=dict(heads=2))),
        optimizer=dict(learning_rate=0.003, weight_decay=0.1, warmup_steps=2, epsilon=1e-3),
        train=dict(batch_size=16, steps=30, log_every=1, checkpoint_every=10, eval_every=100, tensorboard=False),
        mesh=dict(fsdp=-1),
    ))
"""
STEPS = 30  # of the config
pytestmark = pytest.mark.slow


def launch(devices, *arguments):
    """A process of `experiments.train` with some emulated devices."""
    kept = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    environment = os.environ | {
        "XLA_FLAGS": " ".join([*kept, f"--xla_force_host_platform_device_count={devices}"]),
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "experiments.train", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def two(*arguments):
    """Two processes of four devices each that train one run."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"--coordinator=localhost:{probe.getsockname()[1]}"
    several = (*arguments, coordinator, "--num_processes=2")
    return [launch(4, *several, f"--process_id={number}") for number in (0, 1)]


def config_of(folder):
    config = folder / "config.py"
    config.write_text(CONFIG)
    return f"--config={config}"


def finish(*processes):
    """The output of processes, all of which finish well."""
    texts = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(texts)
    return texts


def losses(workdir):
    return [line["loss"] for line in read_lines(workdir / "metrics.jsonl") if line["kind"] == "train"]


def test_two_processes_give_the_losses_of_one(tmp_path):
    one, both = tmp_path / "one", tmp_path / "both"
    finish(launch(8, config_of(tmp_path), f"--workdir={one}"))
    main, other = finish(*two(config_of(tmp_path), f"--workdir={both}"))
    assert len(losses(both)) == STEPS
    np.testing.assert_allclose(losses(both), losses(one), rtol=1e-5)
    assert "2 processes" in main
    assert "parameters on" not in other, "one process reports"
    # Each process wrote its part of the arrays.
    assert len(list((both / "checkpoints" / str(STEPS)).rglob("ocdbt.process_*"))) == 2


def test_a_lost_process_is_noticed_and_the_run_resumes_on_other_devices(tmp_path):
    workdir = tmp_path / "run"
    finish(launch(8, config_of(tmp_path), f"--workdir={tmp_path / 'whole'}"))
    processes = two(config_of(tmp_path), f"--workdir={workdir}")
    deadline = time.monotonic() + 200
    while not (workdir / "checkpoints" / "10").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(processes[1].pid, signal.SIGKILL)
    killed = time.monotonic()
    text = processes[0].communicate(timeout=90)[0]
    processes[1].communicate()
    assert time.monotonic() - killed < 60
    if processes[0].returncode == 0:
        pytest.fail("the run ended before a process was lost; give it more steps")
    assert "another process" in text or "heartbeat" in text, text
    for devices in (1, 8):
        copy = tmp_path / f"resumed{devices}"
        subprocess.run(["cp", "-r", workdir, copy], check=True)
        finish(launch(devices, config_of(tmp_path), f"--workdir={copy}"))
        np.testing.assert_allclose(losses(copy), losses(tmp_path / "whole"), rtol=1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("localhost:1", None, 0), "--num_processes is missing"),
        (("localhost:1", 2, 2), "process_id=2; expected 0 to 1"),
        (("localhost", 2, 0), "expected HOST:PORT"),
        (("localhost:1", 0, 0), "num_processes=0; expected at least 1"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        hosts.connect(*arguments)
