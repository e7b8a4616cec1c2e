"""A language model on two processes of four emulated devices each: one process's losses, resumed on other devices."""

import subprocess

import numpy as np
import pytest

from tests.experiments import language_config
from tests.experiments.parallel.test_hosts import ROOT, finish, launch, losses, two

pytestmark = pytest.mark.slow
HALF = language_config.STEPS // 2


def arguments(folder, workdir, *flags):
    config = ROOT / "tests" / "experiments" / "language_config.py"
    return (f"--config={config}:folder={folder}", f"--workdir={workdir}", *flags)


@pytest.mark.timeout(600)
def test_parameters_divided_over_two_processes(tmp_path):
    language_config.write_text(tmp_path)
    whole, run = tmp_path / "whole", tmp_path / "run"
    finish(launch(8, *arguments(tmp_path, whole)))
    expected = losses(whole)
    assert len(expected) == language_config.STEPS
    main, _ = finish(*two(*arguments(tmp_path, run, f"--config.train.steps={HALF}")))
    assert "fsdp 8, 2 processes" in main
    # The second stage, whose batches have other widths, begins within the first half.
    np.testing.assert_allclose(losses(run), expected[:HALF], rtol=1e-5)
    # Each process wrote its part of the arrays.
    assert len(list((run / "checkpoints" / str(HALF)).rglob("ocdbt.process_*"))) == 2
    for devices in (1, 4):
        copy = tmp_path / f"resumed{devices}"
        subprocess.run(["cp", "-r", run, copy], check=True)
        finish(launch(devices, *arguments(tmp_path, copy)))
        np.testing.assert_allclose(losses(copy), expected, rtol=1e-5)
