"""Rows that devices share: every case of the study at a tiny size."""

import json

import jax
import pytest

from experiments.benchmark import links, long_rows, parallel, timing
from experiments.benchmark.__main__ import main

TINY = long_rows.Setting(time=32, size="tiny", count=2, rounds=1)


def test_cases_are_chosen_by_how_their_names_begin():
    assert long_rows.chosen(()) == list(long_rows.cases())
    found = long_rows.chosen(("train/gated_deltanet", "links"))
    assert found == [
        "links",
        "train/gated_deltanet/one",
        "train/gated_deltanet/whole",
        "train/gated_deltanet/all_gather",
        "train/gated_deltanet/all_scan",
    ]
    with pytest.raises(ValueError, match="only='train/mamba' is no case.*; expected links, .*memory/all/4T"):
        long_rows.chosen(("train/mamba",))


def test_a_row_is_compared_with_that_of_one_device():
    one = {"case": "transformer/one", "tokens_per_second": 10.0, "flops": 80, "time": 8}
    two = {"case": "transformer/ring", "tokens_per_second": 15.0, "flops": 320, "time": 16}
    ratios = {"times_one_device": 1.5, "operations_times_one_device": 3.0}
    assert long_rows.compared(two, [one]) == two | ratios
    assert long_rows.compared(two, []) == two
    whole = two | {"case": "transformer/whole", "tokens_per_second": 5.0}
    ratios |= {"times_one_device_whole": 3.0, "operations_times_one_device_whole": 3.0}
    assert long_rows.compared(two, [one, whole]) == two | ratios
    full = {"case": "transformer/one", "out_of_memory": "9 bytes"}
    assert long_rows.compared(two, [full]) == two


def test_cases_of_memory_have_the_devices_to_themselves():
    memory = ["memory/one/4T", "memory/all/4T"]
    assert long_rows.grouped(["links", *memory], 3) == [(["links"], 3), (memory, 1)]
    assert long_rows.grouped(memory, 3) == [(memory, 1)]


def test_a_program_lacks_what_it_needs_beyond_the_memory_of_a_device():
    assert long_rows.lacks(10, {"bytes_limit": 10}) is None
    assert long_rows.lacks(10, None) is None
    assert long_rows.lacks(10, {}) is None
    expected = "the program needs 11,000 bytes, and a device gives 10,000"
    assert long_rows.lacks(11_000, {"bytes_limit": 10_000}) == expected


@pytest.mark.slow
def test_a_program_without_memory_is_not_started(monkeypatch):
    """One that ends on one device leaves the others waiting."""
    monkeypatch.setattr(long_rows, "device_memory", lambda: {"bytes_limit": 1000})
    monkeypatch.setattr(long_rows, "_steps", lambda *_: pytest.fail("the step was started"))
    row = long_rows.measure(TINY, "memory/all/2T")
    assert row["needed_bytes"] > 1000
    assert (
        row["out_of_memory"] == f"the program needs {row['needed_bytes']:,} bytes, and a device gives 1,000"
    )


def test_what_is_donated_counts_once():
    step = jax.jit(lambda x: x + 1, donate_argnums=0).lower(jax.numpy.zeros(1024)).compile()
    assert timing.peak_bytes(step) == 4096


def test_links_are_a_line_through_what_was_timed(monkeypatch, tmp_path):
    """A chain of n operations takes n (2 us + bytes / 1 GB/s) and 1 ms to start."""

    def interleaved(calls, rounds):
        seconds, lengths = 2e-6 + next(sizes) / 1e9, {"short": links.SHORT, "long": links.LONG}
        return {name: timing.Timing(1 + 1e3 * lengths[name] * seconds, 0, 0) for name in calls}

    count, held = 4, (1024, 4096)
    sizes = iter([links._sent(name, count) * size for name in links.OPERATIONS for size in held])
    monkeypatch.setattr(links, "interleaved", interleaved)
    monkeypatch.setattr(links, "ceilings", lambda dtype: timing.Ceilings(1, 3e14, 1))
    found = links.measure(jax.devices()[:count], held, 1)
    assert found["links"] == pytest.approx({"latency": 2e-6, "bandwidth": 1e9, "flops": 3e14})
    by_size = {(row["operation"], row["bytes"]): row for row in found["operations"]}
    assert by_size["all_gather", 4096]["sent_bytes"] == 3 * 4096
    assert by_size["all_to_all", 4096]["seconds"] == pytest.approx(2e-6 + 3072 / 1e9)
    path = tmp_path / "long_rows.json"
    path.write_text(json.dumps({"rows": [{"case": "train"}, {"device": "4 x toy"} | found]}))
    measured = parallel.read_links(path)
    assert (
        measured.describe()
        == "measured on 4 x toy: 2 us per message, 1 GB/s per device and direction, 300 TFLOP/s"
    )
    path.write_text('{"rows": []}')
    with pytest.raises(ValueError, match=r"long_rows.json has no measured links; .*--only=links"):
        parallel.read_links(path)
    with pytest.raises(ValueError, match="links lie between devices, and JAX sees one"):
        links.measure(jax.devices()[:1], held, 1)


def test_collectives_of_a_chain_do_what_they_are_named_for():
    """What a device holds after each: what the device before it held, after it, and a part of what each did."""
    mesh = jax.sharding.Mesh(jax.devices()[:2], (links.AXIS,))
    cut = jax.sharding.PartitionSpec(links.AXIS)
    x = jax.numpy.arange(8.0)

    def after(name):
        return jax.shard_map(lambda x: links.OPERATIONS[name](x, 2), mesh=mesh, in_specs=cut, out_specs=cut)(
            x
        ).tolist()

    assert after("send") == after("all_gather") == [4, 5, 6, 7, 0, 1, 2, 3]
    assert after("all_to_all") == [0, 1, 4, 5, 2, 3, 6, 7]


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in long_rows.cases() if case.startswith(("train", "trans"))])
def test_a_step_is_measured(case):
    row = long_rows.measure(TINY, case)
    how = case.rpartition("/")[2]
    assert row["devices"] == (1 if how in long_rows.ALONE else 2)
    assert row["time"] == (32 if case.startswith("train") and how != "one" else 16)
    assert row["tokens_per_second"] > 0
    assert (row["sent_bytes"] is None) == (how in long_rows.ALONE)
    if case.startswith("transformer"):
        one = long_rows.measure(TINY, "transformer/one")
        assert row["loss"] == pytest.approx(one["loss"], rel=2e-3)  # bfloat16


@pytest.mark.slow
def test_a_long_row_is_read_in_float32_and_bfloat16():
    small, large = (long_rows.measure(TINY, f"prefill/{dtype}") for dtype in ("float32", "bfloat16"))
    assert small["time"] == large["time"] == 4 * 32
    assert small["difference"] < 2e-5 > small["last_logits_difference"]
    assert large["difference"] < 5e-2 > large["last_logits_difference"]


@pytest.mark.slow
def test_the_command_writes_a_row_for_each_case(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    options = ["--time=16", "--size=tiny", "--rounds=1", f"--out={tmp_path}"]
    assert main(["long_rows", "--only=memory/all/2T", *options]) == 0
    (row,) = json.loads((tmp_path / "long_rows.json").read_text())["rows"]
    assert row == json.loads(capsys.readouterr().out)
    assert (row["case"], row["time"], row["remat"]) == ("memory/all/2T", 32, "full")
    # Two devices do not divide 9 tokens.
    assert main(["long_rows", "--only=train/gated_deltanet/all_gather", "--time=9", *options[1:]]) == 1
    assert "a row of 9 tokens" in capsys.readouterr().out


def test_an_implementation_that_does_not_exist_is_refused(capsys):
    assert main(["long_rows", "--prefer=delta_rule"]) == 2
    assert "--prefer=delta_rule; expected primitive/implementation" in capsys.readouterr().err
