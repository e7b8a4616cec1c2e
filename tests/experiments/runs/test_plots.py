"""Curves as PNG."""

import pytest

from experiments.runs.plots import draw_curves

LINES = [
    {"kind": "train", "step": 5, "loss": 2.0},
    {"kind": "train", "step": 10, "loss": 1.0},
    {"kind": "validation", "step": 10, "loss": 1.5, "accuracy": 0.5},
    {"kind": "test", "step": 10, "loss": 1.5, "accuracy": 0.5},
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "lines", [LINES, [], [{"kind": "validation", "step": 1, "loss": None, "accuracy": 0.1}]]
)
@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_curves_are_drawn(tmp_path, lines, metric):
    path = tmp_path / "curves.png"
    draw_curves({"a": lines, "b": LINES}, path, metric=metric, baselines={"majority": 0.2, "none": None})
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.filterwarnings("error")
def test_different_runs_look_different(tmp_path):
    for name, lines in (("one", LINES), ("none", [])):
        draw_curves({"a": lines}, tmp_path / name, metric="accuracy")
    assert (tmp_path / "one").read_bytes() != (tmp_path / "none").read_bytes()
