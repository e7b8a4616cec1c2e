"""Tuning: a layout that is right is timed, one that is wrong or fails is reported, and the rest continues."""

import dataclasses

import jax.numpy as jnp
import pytest

from experiments.benchmark import (
    tune,
    tune_delta_rule,
    tune_gated_linear_attention,
    tune_linear_recurrence,
    tune_short_conv,
)
from layers.kernels import mosaic_gpu
from layers.kernels.linear_recurrence import gpu
from layers.kernels.linear_recurrence.gpu import kernels as gpu_kernels
from layers.kernels.linear_recurrence.gpu.kernels import Settings

RIGHT, FAILS = Settings(steps=8, stages=2, unroll=4), Settings(stages=0)
SIZES = tune.Sizes(batch=1, time=11, rounds=1)


def tuned(monkeypatch, **options):
    """Rows and lines of one small problem, under the interpreter."""
    problem = tune_linear_recurrence.Problem("small", (1, 11, 8), **options)
    monkeypatch.setitem(tune.PROBLEMS, "linear_recurrence", lambda: iter([problem]))
    kept, said = [], []
    with mosaic_gpu.interpreted():
        tune.run(("linear_recurrence/small",), SIZES, 1e9, said.append, lambda rows: kept.append(list(rows)))
    assert [len(rows) for rows in kept] == sorted(len(rows) for rows in kept)
    return kept[-1], said


@pytest.mark.slow
def test_rows_of_all_passes(monkeypatch):
    rows, said = tuned(monkeypatch, forward=(RIGHT, FAILS), backward=(RIGHT,), segments=True)
    timed = [row for row in rows if "ms" in row]
    assert {row["part"] for row in timed} == set(tune.PARTS)
    assert all(row["error"] < 1e-6 and row["over_floor"] == row["ms"] / row["floor_ms"] for row in timed)
    # a, x and the output, 11 x 8 float32 each, at 1 GB/s.
    assert timed[0]["floor_ms"] == pytest.approx(3 * 11 * 8 * 4 / 1e9 * 1e3)
    (failed,) = (row for row in rows if "failure" in row)
    assert failed["layout"].startswith("vector 1, steps 16, stages 0")
    assert failed["part"] == "forward"
    assert any("x floor" in line for line in said)


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(
        gpu_kernels, "plus", lambda p, q: tuple(u + 1.001 * v for u, v in zip(p, q, strict=True))
    )
    rows, _ = tuned(monkeypatch, forward=(RIGHT,), backward=())
    (row,) = (row for row in rows if row["part"] == "forward" and "steps" in row["layout"])
    assert row["failure"].startswith("wrong: relative error")
    assert "ms" not in row


@pytest.mark.slow
def test_delta_rule(monkeypatch):
    """Every pass of the kernels and of XLA is checked against float64."""
    tiny = tune_delta_rule.Problem("tiny", (1, 20, 1, 64), segments=True)
    monkeypatch.setitem(tune.PROBLEMS, "delta_rule", lambda: iter([tiny]))
    kept = []
    with mosaic_gpu.interpreted():
        tune.run(("delta_rule/tiny",), tune.Sizes(rounds=1), 1e9, lambda line: None, kept.append)
    timed = {(row["part"], row["layout"]): row["error"] for row in kept[-1] if "ms" in row}
    assert len(timed) == 7
    assert all(0 < error < 1e-2 for error in timed.values())
    layout = tune_delta_rule._name(tune_delta_rule.Settings())
    assert {
        ("forward", layout),
        ("backward", layout),
        ("both", "gpu, likewise, states again"),
    } < timed.keys()


@pytest.mark.slow
def test_gated_linear_attention(monkeypatch):
    """Every pass of the kernels is checked against XLA in float32."""
    tiny = tune_gated_linear_attention.Problem("tiny", (1, 8, 1, 1, 64, 64), segments=True)
    tiny = dataclasses.replace(tiny, forward=tiny.forward[:1], backward=tiny.backward[:1])
    monkeypatch.setitem(tune.PROBLEMS, "gated_linear_attention", lambda: iter([tiny]))
    kept = []
    with mosaic_gpu.interpreted():
        tune.run(("gated_linear_attention/tiny",), tune.Sizes(rounds=1), 1e9, lambda line: None, kept.append)
    timed = {(row["part"], row["layout"]): row["error"] for row in kept[-1] if "ms" in row}
    assert len(timed) == 5
    assert all(0 < error < 1e-2 for error in timed.values())
    assert {("forward", "stages 2"), ("backward", "stages 2"), ("both", "xla")} < timed.keys()


@pytest.mark.slow
@pytest.mark.parametrize("state", [False, True])
def test_short_conv(monkeypatch, state):
    """Every pass of the kernels and of XLA is checked against float64."""
    layout = tune_short_conv.Settings(vector=1, steps=8, stages=2)
    tiny = tune_short_conv.Problem("tiny", (1, 20, 8), segments=True, state=state)
    tiny = dataclasses.replace(tiny, forward=(layout,), backward=(layout,))
    monkeypatch.setitem(tune.PROBLEMS, "short_conv", lambda: iter([tiny]))
    kept = []
    with mosaic_gpu.interpreted():
        tune.run(("short_conv/tiny",), tune.Sizes(rounds=1), 1e9, lambda line: None, kept.append)
    timed = {(row["part"], row["layout"]): row["error"] for row in kept[-1] if "ms" in row}
    assert len(timed) == 6
    assert all(0 < error < 1e-2 for error in timed.values())
    assert ("both", "gpu, the fastest of both") in timed


def test_errors_are_relative():
    want = {"h": jnp.array([3.0, 4.0])}
    assert tune.errors({"h": jnp.array([3.0, 4.5]), "more": 0}, want)["h"] == pytest.approx(0.1)


def test_refusals():
    with pytest.raises(ValueError, match="nothing to tune; choose from delta_rule, .*linear_recurrence"):
        list(tune.selected(("long_conv",)))
    with pytest.raises(ValueError, match="cannot be tuned here: it needs a Hopper GPU"):
        tune.run((), SIZES, 1e9, print, print)


def test_best_layouts_are_used_together():
    prepared = tune_linear_recurrence.Problem("small", (1, 11, 8), scan=True).prepare(SIZES)
    assert gpu.FORWARD != RIGHT
    trials = prepared.trials("both", {"forward": RIGHT, "backward": RIGHT})
    assert list(trials) == ["gpu, the fastest of both", "xla", "lax.associative_scan"]
