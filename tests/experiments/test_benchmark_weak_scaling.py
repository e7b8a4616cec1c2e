"""Weak scaling: its cases, their comparison with one device, and a tiny study on emulated devices."""

import json

import pytest

from experiments.benchmark import weak_scaling
from experiments.benchmark.__main__ import main

TINY = weak_scaling.Setting(time=16, batch=2, rounds=1)


def test_cases():
    assert weak_scaling.cases(1, ("mamba2",)) == ["mamba2/fsdp/1"]
    by_count = [f"rg_lru/fsdp/{count}" for count in (1, 2, 4, 8)]
    assert weak_scaling.cases(9, ("rg_lru",)) == [*by_count, "rg_lru/tensor/4", "rg_lru/tensor/8"]
    assert {case.partition("/")[0] for case in weak_scaling.cases(2, ())} == set(weak_scaling.MODELS)
    with pytest.raises(ValueError, match="'mambo' is unknown"):
        weak_scaling.cases(2, ("mambo",))


def test_a_row_is_compared_with_one_device_of_its_model():
    one = {"case": "attention/fsdp/1", "tokens_per_second": 10.0, "tokens_per_second_per_device": 10.0}
    other = one | {"case": "mamba2/fsdp/1", "tokens_per_second_per_device": 1.0}
    four = {"case": "attention/tensor/4", "tokens_per_second": 32.0, "tokens_per_second_per_device": 8.0}
    assert weak_scaling.compared(four, [other, one]) == four | {"efficiency": 0.8}
    assert weak_scaling.compared(four, [other]) == four
    failed = {"case": "attention/fsdp/2", "failed": "no"}
    assert weak_scaling.compared(failed, [one]) == failed
    assert weak_scaling.compared(one, [other]) == one | {"efficiency": 1.0}
    assert weak_scaling.line(failed).endswith("no")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gated_deltanet/fsdp/1", "gated_deltanet/fsdp/4", "attention/tensor/4"])
def test_a_step_is_measured(case):
    """Rows grow with the devices, parameters are divided, and only several devices send."""
    row = weak_scaling.measure(TINY, case)
    count = int(case.rpartition("/")[2])
    assert (row["devices"], row["batch"]) == (count, 2 * count)
    assert row["tokens_per_second_per_device"] == row["tokens_per_second"] / count > 0
    assert (row["sent_bytes"] is None) == (count == 1)
    if count > 1:
        # Parameters that are divided are gathered in both passes: half of them, in bfloat16, three quarters from others.
        assert row["sent_bytes"] > row["parameters"]
    assert "GB" in weak_scaling.line(dict(case=case) | row)


@pytest.mark.slow
def test_the_command_writes_a_row_and_a_plot(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    options = ["--time=16", "--batch=1", "--rounds=1", f"--out={tmp_path}"]
    assert main(["weak_scaling", "--only=rg_lru", "--num_devices=1", *options]) == 0
    (row,) = json.loads((tmp_path / "weak_scaling.json").read_text())["rows"]
    assert (row["case"], row["efficiency"]) == ("rg_lru/fsdp/1", 1.0)
    assert (tmp_path / "weak_scaling.png").stat().st_size > 1000
    assert "tokens/s per device" in capsys.readouterr().out
    assert main(["weak_scaling", "--num_devices=9", *options]) == 2
    assert "num_devices=9; JAX sees 2" in capsys.readouterr().err
