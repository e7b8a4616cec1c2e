"""Kernels for TPUs under the interpreter that follows memory, and lowered at the sizes of benchmarks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from layers.kernels import devices, mosaic_tpu
from layers.kernels.delta_rule import tpu as delta_rule
from layers.kernels.gated_linear_attention import tpu as gated_linear_attention
from layers.kernels.linear_recurrence import tpu as linear_recurrence
from layers.kernels.suite import Case
from tests.layers.kernels import test_primitives as shared
from tests.layers.kernels.suites import SUITES

# Memory that was not written is NaN; parallel axes of the grid go to two cores in random order.
STRICT = pltpu.InterpretParams(
    detect_races=True,
    uninitialized_memory="nan",
    out_of_bounds_reads="raise",
    num_cores_or_threads=2,
    random_seed=7,
)


def normal(rng, *shape):
    return rng.standard_normal(shape)


def wide_recurrence(rng, batch, time):
    """Three blocks of channels, the last with missing ones; one decay for all rows."""
    return {"a": rng.uniform(0.2, 1.0, (1, time, 20)), "x": normal(rng, batch, time, 20)}


def many_heads(rng, batch, time):
    """As in Mamba-2: groups of 32 heads, of which the kernel takes 8 at once, with values side by side in registers."""
    tokens = {"q": normal(rng, batch, time, 2, 6), "k": normal(rng, batch, time, 2, 6)}
    return tokens | {"v": normal(rng, batch, time, 64, 4), "log_decay": -rng.random((batch, time, 64))}


CASES = [
    *(("linear_recurrence", case) for case in SUITES["linear_recurrence"].cases),
    ("linear_recurrence", Case("wide", wide_recurrence, state=lambda rng, b: normal(rng, b, 20))),
    *(
        ("gated_linear_attention", case)
        for case in SUITES["gated_linear_attention"].cases
        if case.name in ("scalar", "no_decay", "fixed_decay")
    ),
    ("gated_linear_attention", Case("many_heads", many_heads, state=lambda rng, b: normal(rng, b, 64, 6, 4))),
    *(("delta_rule", case) for case in SUITES["delta_rule"].cases if case.tpu),
]
cases = pytest.mark.parametrize(
    "name, case",
    [
        pytest.param(
            name,
            case,
            id=f"{name}-{case.name}",
            marks=[pytest.mark.slow] * (case.name not in ("wide", "scalar")),
        )
        for name, case in CASES
    ],
)


@pytest.mark.sample(2)
@cases
def test_no_races_and_no_unwritten_memory(name, case, monkeypatch, capfd):
    """Outputs and gradients are those of the definition when memory starts as NaN and cores run at once."""
    monkeypatch.setattr(mosaic_tpu, "INTERPRET", STRICT)
    monkeypatch.setattr(linear_recurrence, "CHANNELS", 16)
    ids = jnp.asarray([[0] * 3 + [1] * 36 + [0] * 2 + [2] * 30 + [5] * 2, [2] * 73], jnp.int32)
    arguments = shared.cast(shared.draw(case, 2, 73), "float32")
    compare(name, case, arguments, "float32", segment_ids=ids)
    assert "RACE DETECTED" not in capfd.readouterr().out


def compare(name, case, arguments, dtype, **segments):
    """Outputs, states and gradients with those of the float64 reference."""
    got, want, _ = shared.beside_reference(SUITES[name], case, "tpu", arguments, **segments)
    shared.close(got, want, shared.tolerance_of(case, dtype), "outputs and gradients")


def test_delta_rule_of_a_packed_row(monkeypatch):
    """A few short blocks in the simple interpreter."""
    monkeypatch.setattr(delta_rule, "CHUNK", 8)
    monkeypatch.setattr(delta_rule, "CHUNKS", 1)
    case = SUITES["delta_rule"].cases[1]
    arguments = shared.cast(shared.draw(case, 1, 21), "float32")
    ids = jnp.asarray([[0] * 3 + [1] * 9 + [0] * 2 + [2] * 4 + [5] * 3], jnp.int32)
    compare("delta_rule", case, arguments, "float32", segment_ids=ids)


def calls_to_lower(primitive):
    """Every case in two ways and every benchmark that the kernels take: name, arguments, options and segments."""
    for name, case in CASES:
        if name != primitive:
            continue
        for time, dtype in ((300, "float32"), (37, "bfloat16")):
            arguments = shared.cast(shared.draw(case, 2, time), dtype)
            ids = jax.ShapeDtypeStruct((2, time), jnp.int32) if dtype == "float32" else None
            yield name, case.name, arguments, case.options, ids
    for benchmark in SUITES[primitive].benchmarks:
        if "channel" in benchmark.name or benchmark.name == "KDA":
            continue
        drawn = benchmark.draw(np.random.default_rng(0), 1, 2, 1)
        size = benchmark.batch, benchmark.time
        arguments = {
            key: jax.ShapeDtypeStruct((*size, *value.shape[2:]), benchmark.dtype)
            for key, value in drawn.items()
        }
        yield primitive, benchmark.name, arguments, benchmark.options, None


@pytest.mark.parametrize(
    "primitive",
    ["linear_recurrence", "gated_linear_attention", pytest.param("delta_rule", marks=pytest.mark.slow)],
)
def test_lower_for_a_tpu(tpu_blocks, monkeypatch, primitive):
    """With the blocks of a TPU, gradients are one kernel forward and one backward."""
    for setting in tpu_blocks:
        monkeypatch.setattr(*setting)
    monkeypatch.setattr(mosaic_tpu, "INTERPRET", False)
    for name, label, arguments, options, ids in calls_to_lower(primitive):

        def gradients(arguments, ids, function=SUITES[name].function, options=options):
            def loss(arguments):
                out = function(**arguments, **options, segment_ids=ids, impl="tpu")
                return sum(jnp.sum(jnp.square(jnp.abs(leaf))) for leaf in out)

            return jax.grad(loss)(arguments)

        exported = jax.export.export(jax.jit(gradients), platforms=["tpu"])(arguments, ids)
        assert exported.mlir_module().count("@tpu_custom_call") == 2, f"{name} {label}"


@pytest.mark.parametrize(
    "name",
    ["linear_recurrence", "gated_linear_attention", pytest.param("delta_rule", marks=pytest.mark.slow)],
)
def test_only_a_tpu_takes_the_kernels(name, monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "INTERPRET", None)
    case = SUITES[name].cases[0]
    arguments = shared.cast(shared.draw(case, 1, 300), "float32")
    with pytest.raises(ValueError, match="impl='tpu'.*the device is a cpu; expected a TPU"):
        shared.call(SUITES[name], case, "tpu", arguments)
    module = {
        "linear_recurrence": linear_recurrence,
        "gated_linear_attention": gated_linear_attention,
        "delta_rule": delta_rule,
    }[name]
    monkeypatch.setattr(module, name, lambda **_: pytest.fail("the kernel was chosen"))
    shared.call(SUITES[name], case, None, arguments)


def test_automatic_on_a_tpu(monkeypatch):
    """Long sequences of wide layers take the kernels, single steps and short or narrow ones do not."""
    monkeypatch.setattr(mosaic_tpu, "INTERPRET", None)
    monkeypatch.setattr(mosaic_tpu, "LANES", 128)
    with devices.as_on("tpu"):
        for shape, taken in (((2, 512, 256), True), ((2, 1, 256), False), ((2, 512, 5), False)):
            assert (linear_recurrence.passed_over_reason(x=jnp.zeros(shape)) is None) is taken
        for shape, dtype, taken in (
            ((2, 512, 4, 128), jnp.bfloat16, True),
            ((2, 512, 4, 128), jnp.float32, False),
            ((2, 1, 4, 128), jnp.bfloat16, False),
            ((2, 512, 4, 16), jnp.bfloat16, False),
        ):
            x = jnp.zeros(shape, dtype)
            assert (gated_linear_attention.passed_over_reason(q=x, k=x, v=x) is None) is taken
            assert (delta_rule.passed_over_reason(q=x, k=x, v=x) is None) is taken


def test_automatic_only_where_nothing_is_partitioned(monkeypatch):
    """With several devices and no mesh, only inside shard_map: kernels cannot be partitioned."""
    monkeypatch.setattr(mosaic_tpu, "INTERPRET", None)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert jax.device_count() == 8
    assert "several devices and no mesh" in mosaic_tpu.passed_over_reason(jnp.zeros((8, 2)))

    def inside(x):
        assert mosaic_tpu.passed_over_reason(x) is None
        return x

    jax.eval_shape(shared.over_devices(inside, shared.ROWS, shared.ROWS), jnp.zeros((8, 2)))


def test_delta_rules_are_refused_with_the_reason():
    arguments = {key: jnp.zeros((1, 3, 2, 4)) for key in ("q", "k", "v")} | {"beta": jnp.zeros((1, 3, 2))}
    wide = {key: jnp.zeros((1, 3, 2, 640)) for key in ("q", "k", "v")}
    for options, reason in (
        ({"log_decay": jnp.zeros((1, 3, 2, 4))}, "per key channel"),
        (wide, "heads of 640 by 640 do not fit into VMEM"),
        ({"v": jnp.zeros((1, 3, 2, 4), jnp.float16)}, "float16"),
    ):
        with pytest.raises(ValueError, match=f"impl='tpu'.*{reason}"):
            SUITES["delta_rule"].function(**arguments | options, impl="tpu")


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"normalize": True}, "normalize=True"),
        ({"bonus": jnp.ones((2, 4))}, "bonus"),
        ({"log_decay": jnp.zeros((1, 3, 2, 4))}, "per key channel"),
        ({"v": jnp.zeros((1, 3, 1 << 16, 8))}, "32768 heads that share queries and keys"),
        ({"q": jnp.zeros((1, 3, 2, 4), jnp.float16)}, "float16"),
    ],
)
def test_refused_with_the_reason(options, reason):
    arguments = {key: jnp.zeros((1, 3, 2, 4)) for key in ("q", "k", "v")} | options
    with pytest.raises(ValueError, match=f"impl='tpu'.*{reason}"):
        SUITES["gated_linear_attention"].function(**arguments, impl="tpu")
