"""Timing primitives: sizes and floors, errors that notice a wrong result, peers that fail, and the command."""

import dataclasses
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmark import calls, kernels, mixer_scaling, peers, report, scaling, steps, timing
from experiments.benchmark.__main__ import main
from layers.kernels.suites import SUITES

SMALL = kernels.Options(
    only=("linear_recurrence/real",),
    dtype="float32",
    batch=2,
    time=16,
    narrower=8,
    rounds=2,
    peers=True,
    workers=1,
)
CEILINGS = {"float32": timing.Ceilings(bytes=1e9, matrix=1e12, vector=1e10)}


def benchmark(primitive, index=0):
    return SUITES[primitive].benchmarks[index]


@pytest.mark.parametrize("name", SUITES)
def test_resized_benchmarks_draw_what_they_count(name):
    for case in SUITES[name].benchmarks:
        small, double = case.resized(1, 32, 8), case.resized(2, 32, 8)
        shapes = [{k: v.shape for k, v in calls.draw(b, "float32").items()} for b in (small, double)]
        assert all(
            "steps" in s or any(shape[:2] == (n, 32) for shape in s.values()) for s, n in zip(shapes, (1, 2))
        )
        assert double.forward_bytes == pytest.approx(2 * small.forward_bytes, rel=1e-3)
        assert double.backward_flops == pytest.approx(2 * small.backward_flops, rel=1e-3)
        longer = case.resized(1, 64, 8)
        growth = 4 if case.quadratic else 2
        assert longer.forward_flops == pytest.approx(growth * small.forward_flops, rel=1e-3)


@pytest.mark.parametrize("case", SUITES["gated_linear_attention"].benchmarks, ids=lambda case: case.name)
def test_heads_are_fewer_in_proportion(case):
    whole, narrow = (case.resized(1, 8, n).draw(np.random.default_rng(0), 1, 8) for n in (1, 8))
    assert whole["v"].shape[2] == 8 * narrow["v"].shape[2]


def test_counted_bytes_are_inputs_and_outputs():
    case = benchmark("linear_recurrence").resized(2, 16, 8)
    arrays = calls.draw(case, "float32")
    assert case.forward_bytes == sum(a.nbytes for a in arrays.values()) * 3 // 2


def test_errors_notice_a_wrong_result_and_a_wrong_gradient():
    suite, case = SUITES["linear_recurrence"], benchmark("linear_recurrence").resized(1, 24, 8)
    arrays = calls.draw(case, "float32")
    right = calls.with_implementation(suite, case, None)

    check = calls.check(suite, case, arrays)

    def errors(function):
        return calls.errors(calls.JaxFunction(function), check)

    assert max(errors(right)) < 1e-6
    error, gradient_error = errors(lambda **a: 1.1 * right(**a))
    assert error == pytest.approx(0.1, rel=1e-3)
    assert gradient_error == pytest.approx(0.1, rel=1e-3)

    def half_gradient(a, x):
        return right(a=a, x=x / 2 + jax.lax.stop_gradient(x / 2))

    error, gradient_error = errors(half_gradient)
    assert error < 1e-6
    assert gradient_error == pytest.approx(0.5, rel=1e-3)


def test_a_study_times_everything_and_records_what_fails(monkeypatch):
    def broken(a, x):
        raise NotImplementedError("not on this device\nmore")

    monkeypatch.setitem(peers.PLAIN[("linear_recurrence", "real")], "broken", broken)
    printed, said = [], []
    rows = {row["implementation"]: row for row in kernels.run(SMALL, CEILINGS, printed.append, said.append)}
    assert [line.split(": ready")[0] for line in said] == [f"linear_recurrence/real, {name}" for name in rows]
    assert list(rows) == [row["implementation"] for row in printed]
    assert {name for name, row in rows.items() if row["default"]} == {"xla"}
    assert set(rows) == {"xla", "lax.associative_scan", "broken"}
    assert rows["broken"]["problem"] == "NotImplementedError: not on this device"
    assert "not on this device" in report.line(rows["broken"])
    for name in ("xla", "lax.associative_scan"):
        row = rows[name]
        assert row["error"] < 1e-6
        assert row["gradient_error"] < 1e-6
        low, high = row["both_quartiles_ms"]
        assert 0 < low <= row["both_ms"] <= high
        assert row["forward_floor_ms"] == pytest.approx(1e3 * row["forward_bytes"] / 1e9)
        assert row["both_over_floor"] == pytest.approx(row["both_ms"] / row["both_floor_ms"])
        assert row["both_peak_bytes"] > 3 * 4 * 2 * 16 * 256
    json.dumps(list(rows.values()), allow_nan=False)


def test_what_is_not_ready_in_time_is_left_out(monkeypatch):
    def slow(a, x):
        time.sleep(30)

    monkeypatch.setitem(peers.PLAIN[("linear_recurrence", "real")], "slow", slow)
    rows = kernels.run(dataclasses.replace(SMALL, patience=4.0), CEILINGS, lambda row: None, print)
    problems = {row["implementation"]: row.get("problem") for row in rows}
    assert problems == {
        "xla": None,
        "lax.associative_scan": None,
        "slow": "TimeoutError: not ready within 4 s",
    }


def test_versions_are_of_what_is_installed(monkeypatch):
    monkeypatch.setattr(peers, "PACKAGES", ("numpy", "no-such-library"))
    assert peers.versions() == {"numpy": np.__version__}


def test_what_fails_when_it_runs_costs_nothing_of_the_others():
    study = kernels.Study(
        "linear_recurrence", SUITES["linear_recurrence"], benchmark("linear_recurrence"), SMALL, print
    )

    def exhausted(*_):
        raise RuntimeError("out of memory\nin detail")

    study._contestants["lax.associative_scan"]["functions"] = (exhausted, exhausted)
    rows = {row["implementation"]: row for row in study.measure(CEILINGS["float32"], 1)}
    assert rows["lax.associative_scan"]["problem"] == "RuntimeError: out of memory"
    assert rows["xla"]["both_ms"] > 0


def test_what_fails_of_ours_is_told_apart_from_what_refuses(monkeypatch):
    suite = SUITES["linear_recurrence"]

    def faulty(*args, impl, **kwargs):
        if impl is None:
            raise ZeroDivisionError
        if impl == "reference":
            return suite.function(*args, impl=impl, **kwargs)
        raise ValueError(f"impl={impl!r} of linear_recurrence cannot take this call: it is Monday")

    broken = dataclasses.replace(suite, function=faulty, implementations=("xla", "gpu"))
    monkeypatch.setattr(kernels, "SUITES", {"linear_recurrence": broken})
    rows = kernels.run(SMALL, CEILINGS, lambda row: report.line(row), print)
    assert {row["implementation"] for row in kernels.failures(rows)} == {"default"}
    assert {row["implementation"] for row in rows if "both_ms" in row} == {"lax.associative_scan"}
    assert "it is Monday" in next(row["problem"] for row in rows if row["implementation"] == "gpu")


def test_the_floor_is_the_slower_of_memory_and_arithmetic():
    study = kernels.Study(
        "linear_recurrence", SUITES["linear_recurrence"], benchmark("linear_recurrence"), SMALL, print
    )
    slow_arithmetic = timing.Ceilings(bytes=1e9, matrix=1e12, vector=1e3)
    (row, *_) = study.measure(slow_arithmetic, 1)
    assert row["forward_floor_ms"] == pytest.approx(1e3 * row["forward_flops"] / 1e3)
    assert row["both_floor_ms"] == pytest.approx(row["forward_flops"] + row["backward_flops"])


def test_every_round_times_every_call_starting_with_another():
    order = []

    def call(name):
        return lambda: order.append(name) or np.zeros(1)

    timings = timing.interleaved({name: call(name) for name in "abc"}, rounds=3)
    assert set(timings) == set("abc")
    firsts = [name for name, before in zip(order, [None, *order]) if name != before]
    assert firsts[-9:] == list("abcbcacab")


def test_longer_measurements_repeat_calls_more_often():
    counts = dict.fromkeys((0.001, 1.0), 0)

    def call(seconds):
        counts[seconds] += 1
        time.sleep(0.004)

    for seconds in counts:
        timing.interleaved({"call": functools.partial(call, seconds)}, rounds=2, seconds=seconds)
    assert counts[0.001] == 3 + 2
    assert counts[1.0] > 3 + 2 * 5


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="only='linear' is no benchmark"):
        list(kernels.selected(("linear",)))
    (only,) = kernels.selected(("delta_rule/KDA",))
    assert only[2].name == "KDA"


def test_scaling_covers_every_linear_primitive_and_draws(tmp_path):
    assert {name.partition("/")[0] for name in scaling.CASES} == set(SUITES)
    rows = scaling.run(
        dataclasses.replace(SMALL, only=("short_conv/4 taps, SiLU",)), (16, 32), lambda row: None, print
    )
    assert [row["time"] for row in rows] == [16, 32]
    assert rows[1]["both_peak_bytes"] > rows[0]["both_peak_bytes"]
    report.draw_scaling(rows, tmp_path / "scaling.png", "test")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_mixers_are_timed_at_each_length():
    only = ("mixer/luna", "mixer/attention")
    rows = scaling.run(dataclasses.replace(SMALL, only=only), (16, 32), lambda row: None, print)
    assert [(row["case"], row["time"]) for row in rows] == [
        (n, t) for n in ("attention", "luna") for t in (16, 32)
    ]
    assert all(row["both_ms"] > 0 and row["both_peak_bytes"] > 0 for row in rows)


def test_mixers_are_compared_with_softmax_attention(capsys):
    only = ("mixer/luna", "mixer/attention", "mixer/linformer")
    assert [name for _, name in scaling.chosen(only)] == ["attention", "luna", "linformer"]
    assert len(scaling.chosen(("mixer", "delta_rule/KDA"))) == len(mixer_scaling.CASES) + 1
    times = {("attention", 16): 2.0, ("attention", 32): 8.0, ("luna", 16): 1.0, ("luna", 32): 2.0}
    rows = [dict(primitive="mixer", case=case, time=time, both_ms=ms) for (case, time), ms in times.items()]
    assert mixer_scaling.table(rows).splitlines()[2:] == [
        "| attention | 2.0 (1.00) | 8.0 (1.00) | 2.00 |",
        "| luna | 1.0 (0.50) | 2.0 (0.25) | 1.00 |",
    ]
    assert main(["scaling", "--only=mixer/lunar"]) == 2
    assert "only='mixer/lunar' is no benchmark; choose from attention" in capsys.readouterr().err


def test_a_mixer_without_memory_leaves_the_others(monkeypatch):
    said, problems = [], ["RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.", "INTERNAL: broken"]

    def lacking(*_):
        raise jax.errors.JaxRuntimeError(problems[0])

    monkeypatch.setattr(mixer_scaling, "interleaved", lacking)
    ready = mixer_scaling.prepare("float32", 1, "luna", 16, said.append)
    assert ready.measure() == []
    assert said[-1] == "mixer/luna, 16 tokens: the device has too little memory"
    del problems[0]
    with pytest.raises(jax.errors.JaxRuntimeError, match="broken"):
        ready.measure()


def test_bars_are_drawn(tmp_path):
    rows = kernels.run(SMALL, CEILINGS, lambda row: None, print)
    report.draw_bars(rows, tmp_path / "bars.png", "test")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    assert "linear_recurrence: real, xla, our choice" in report.line(rows[0])


def test_bfloat16_inputs_reach_everything_as_such():
    arrays = calls.draw(benchmark("delta_rule").resized(1, 16, 8), "bfloat16")
    assert {a.dtype for a in arrays.values()} == {jnp.dtype(jnp.bfloat16)}
    assert all(np.asarray(a, np.float32).std() > 0 for a in arrays.values())


def test_the_command_refuses_before_it_computes(tmp_path, capsys):
    out = f"--out={tmp_path / 'out'}"
    assert main(["kernels", "--only=nothing", out]) == 2
    assert "is no benchmark" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main(["kernels", "--narrower=3", out])
    assert left.value.code == 2
    assert "--narrower: invalid choice: 3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_steps_are_timed_on_packed_rows(tmp_path):
    assert main(["steps", "--only=attention", "--rows=packed", "--rounds=1", f"--out={tmp_path}"]) == 0
    rows = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert [row["rows"] for row in rows] == ["packed"]
    assert all(row["tokens_per_second"] > 0 and row["implementations"] == ["attention/xla"] for row in rows)
    packed = steps.random_batch("packed", 3, 20, 9)["segment_ids"]
    assert (packed.max(1) == steps.DOCUMENTS).all()
    assert (np.diff(packed) >= 0).all()


@pytest.mark.slow
def test_a_step_that_fails_in_a_process_of_its_own_is_a_row(tmp_path, capsys):
    arguments = ["steps", "--only=attention", "--rows=whole", "--workers=1", "--rounds=1"]
    assert main([*arguments, "--patience=0.01", f"--out={tmp_path}"]) == 1
    rows = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert [row["failed"] for row in rows] == ["no result within 0.01 s"]
    assert "attention/whole" in capsys.readouterr().out
    assert main([*arguments, f"--out={tmp_path}"]) == 0
    rows = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert [row["case"] for row in rows] == ["attention/whole"]
    assert rows[0]["tokens_per_second"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("model", ["attention", pytest.param("mamba2", marks=pytest.mark.slow)])
def test_steps_of_generation_are_timed_and_states_measured(model, tmp_path):
    arguments = [f"--only={model}", "--batch=2", "--lengths=96,160", "--rounds=1"]
    assert main(["decode", *arguments, f"--out={tmp_path}"]) == 0
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert [(row["model"], row["batch"], row["context"]) for row in rows] == [(model, 2, 96), (model, 2, 160)]
    short, long = (row["state_bytes"] for row in rows)
    if model == "attention":
        # Keys and values of 64 more tokens in bfloat16: 2 rows, 2 layers, 128 features.
        assert long - short >= 64 * 2 * 2 * 2 * 128 * 2
    else:
        assert long == short
    assert all(row["milliseconds"] > 0 for row in rows)
    assert (tmp_path / "decode.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_policy_of_caches_makes_states_smaller(tmp_path):
    sizes = []
    for more in ([], ["--cache=snapkv(budget=32, window=8)"]):
        arguments = ["--only=attention", "--batch=2", "--lengths=96", "--rounds=1", *more]
        assert main(["decode", *arguments, f"--out={tmp_path}"]) == 0
        (row,) = json.loads((tmp_path / "decode.json").read_text())["rows"]
        assert ("cache" in row) == bool(more)
        sizes.append(row["state_bytes"])
    # 32 tokens of the prompt and 32 new ones, in place of a cache of 128 slots.
    assert sizes[1] < 0.6 * sizes[0]


def test_unknown_models_of_steps_are_refused_with_the_nearest(tmp_path, capsys):
    assert main(["steps", "--only=attentoin", f"--out={tmp_path}"]) == 2
    assert "did you mean 'attention'" in capsys.readouterr().err
