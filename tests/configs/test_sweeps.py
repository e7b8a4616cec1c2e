"""Files of sweeps beside the configs: every run has a config whose fields all exist."""

import pytest

from experiments.config.files import NAME, root
from experiments.sweep import points

FILES = sorted(file for file in (root() / NAME).rglob("_*.py") if "def get_sweep" in file.read_text())


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_every_run_has_a_config(file, monkeypatch):
    monkeypatch.setenv("TOKENS", "corpus")
    for point in points.read(file, None):
        point.plain_config()
