"""Kernels for TPUs that take padding at the end of rows alone: `short_conv`, and JAX's splash attention.

As in test_tpu.py, they run under the interpreter that follows memory, and are lowered at the sizes of benchmarks.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.kernels import devices, mosaic_tpu
from layers.kernels.attention import Logits, Mask, Tokens, attention
from layers.kernels.attention import tpu as splash
from layers.kernels.attention.cases import SUITE as ATTENTION
from layers.kernels.segments import Segments
from layers.kernels.short_conv import short_conv
from layers.kernels.short_conv import tpu as convolution
from layers.kernels.short_conv.cases import SUITE as CONVOLUTION
from layers.kernels.suite import Case
from tests.layers.kernels import test_primitives as shared
from tests.layers.kernels.suites import SUITES
from tests.layers.kernels.test_tpu import STRICT, compare, normal

# Segments that begin at the borders of blocks and groups, that are shorter than taps reach, and whose ids come back.
TIME = 73
IDS = np.array([[7] * 20 + [1] * 12 + [2] * 2 + [1] * 30 + [0] * 9, [2] * TIME], np.int32)


def wide_convolution(rng, batch, time):
    """Two blocks of channels, the first of two registers, the last with missing channels."""
    return {"x": normal(rng, batch, time, 20), "weight": normal(rng, 4, 20), "bias": normal(rng, 20)}


def heads_of_eight(rng, batch, time):
    return {name: normal(rng, batch, time, 2, 8) for name in ("q", "k", "v")}


WIDE = Case("wide", wide_convolution, {"activation": "silu"}, state=lambda rng, b: normal(rng, b, 3, 20))
ATTENTION_CASES = [
    *(case for case in ATTENTION.cases if case.name in ("causal", "bidirectional_capped", "large_values")),
    next(case for case in ATTENTION.cases if case.name == "window_bidirectional_sink_logits"),
    Case("window", ATTENTION.cases[0].draw, {"causal": True, "mask": Mask(window=9)}),
    Case(
        "wide_window",
        heads_of_eight,
        {"causal": True, "mask": Mask(window=60), "logits": Logits(logit_cap=3.0), "scale": 1.0},
    ),
]
CASES = [("short_conv", case) for case in (*CONVOLUTION.cases, WIDE)]
CASES += [("attention", case) for case in ATTENTION_CASES]


def row_by_row(kernel, q, k, v, segments, sinks):
    """As `splash._each`: the interpreter that follows memory does not take the axis that `jax.vmap` adds."""
    rows = zip(q, k, v, [None] * len(q) if segments is None else zip(*segments, strict=True), strict=True)
    kind = splash.splash.SegmentIds
    return jnp.stack([kernel(*row, numbers and kind(*numbers), sinks) for *row, numbers in rows])


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "whole"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name, case", [pytest.param(name, case, id=f"{name}-{case.name}") for name, case in CASES]
)
@pytest.mark.slow
def test_no_races_and_no_unwritten_memory(name, case, dtype, packed, monkeypatch, capfd):
    """Outputs and gradients are those of the definition when memory starts as NaN and cores run at once.

    Heads of splash attention share the outputs that it has as scratch memory, which two cores would write and nobody reads.
    """
    time, ids, cores = TIME, IDS, 2
    if name == "attention":  # two blocks of 128, the second with missing tokens
        time, ids, cores = 2 * TIME, np.repeat(IDS, 2, axis=1), 1
    monkeypatch.setattr(mosaic_tpu, "INTERPRET", dataclasses.replace(STRICT, num_cores_or_threads=cores))
    monkeypatch.setattr(splash, "_each", row_by_row)
    segments = {"segment_ids": Segments.of(jnp.asarray(ids), padding="end")} if packed else {}
    compare(name, case, shared.cast(shared.draw(case, 2, time), dtype), dtype, **segments)
    assert "RACE DETECTED" not in capfd.readouterr().out


LITTLE = Case("little", heads_of_eight, {"causal": True, "mask": Mask(window=5)})


@pytest.mark.parametrize(
    "name, case, lengths",
    [
        pytest.param("short_conv", CONVOLUTION.cases[1], [10, 7, 2, 15, 6], id="short_conv"),
        pytest.param("attention", LITTLE, [6, 2, 5, 4, 3], id="attention", marks=pytest.mark.slow),
    ],
)
def test_packed_rows(name, case, lengths, monkeypatch):
    """One row with an id that comes back, in the simple interpreter with blocks of one group."""
    monkeypatch.setattr(convolution, "STEPS", 16)
    arguments = shared.cast(shared.draw(case, 1, sum(lengths)), "float32")
    ids = np.repeat(np.array([[1, 2, 1, 3, 0]], np.int32), lengths, axis=1)
    segments = Segments.of(jnp.asarray(ids), padding="end")
    compare(name, case, arguments, "float32", segment_ids=segments)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [2, 17, 32])
def test_states_carry_over_a_cut(cut):
    arguments = shared.cast(shared.draw(WIDE, 2, 41), "float32")
    run = functools.partial(shared.call, SUITES["short_conv"], WIDE, "tpu")
    whole = run(arguments)
    first, state = run({**arguments, "x": arguments["x"][:, :cut]})
    second, final = run({**arguments, "x": arguments["x"][:, cut:], "initial_state": state})
    shared.close((jnp.concatenate([first, second], axis=1), final), whole, 2e-5, f"cut at {cut}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, case", [("short_conv", CONVOLUTION.cases[1]), ("attention", ATTENTION_CASES[0])]
)
def test_transformations(name, case):
    """jit, vmap, checkpoint, scan and meshes give what the plain call gives; the library's kernels know no shard_map."""
    if name == "short_conv":
        shared.test_transformations(name, case, "tpu")
        return
    arguments = shared.cast(shared.draw(case, 4, 11), "float32")
    run = functools.partial(shared.call, SUITES[name], case, "tpu")
    plain = np.asarray(run(arguments))
    split = jax.tree.map(lambda v: v.reshape(2, 2, *v.shape[1:]), arguments)
    _, scanned = jax.lax.scan(lambda carry, part: (carry, run(part)), None, split)
    for got in (jax.jit(run)(arguments), jax.checkpoint(run)(arguments), jax.vmap(run)(split), scanned):
        shared.close(got.reshape(plain.shape), plain, 2e-5, "transformed")
    with pytest.raises(ValueError, match="pass check_vma=False"):
        shared.over_devices(run, shared.ROWS, shared.ROWS)(shared.cast(shared.draw(case, 8, 11), "float32"))


@pytest.mark.slow
@pytest.mark.parametrize("name, case", [("short_conv", WIDE), ("attention", ATTENTION_CASES[0])])
def test_parts_of_devices_make_the_whole(name, case):
    """Values and gradients are those without a mesh, for arguments that rows share too."""
    arguments = shared.cast(shared.draw(case, 2, 40), "float32")
    segments = Segments.of(jnp.asarray(IDS[:, -40:]), padding="end")

    def loss(arguments):
        out = shared.call(SUITES[name], case, "tpu", arguments, segment_ids=segments)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(out)), out

    want = jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(arguments))
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), kinds, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        got = jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(arguments))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        shared.close(one, other, 2e-5, "on a mesh")


def kernels_lowered(function, *arguments):
    """The kernels that the gradient of a sum of squares of floating-point outputs has as lowered for a TPU."""

    def gradients(arguments, segment_ids):
        segments = None if segment_ids is None else Segments.of(segment_ids, padding="end")

        def loss(arguments):
            out = function(**arguments, segment_ids=segments, impl="tpu")
            return sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(out))

        return jax.grad(loss)(arguments)

    exported = jax.export.export(jax.jit(gradients), platforms=["tpu"])(*arguments)
    return exported.mlir_module().count("@tpu_custom_call")


BENCHMARKS = [
    pytest.param(
        name,
        benchmark,
        dtype,
        marks=[pytest.mark.slow] * (dtype == "float32" or bool(i)),
        id=f"{name}-{i}-{dtype}",
    )
    for name, suite in (("short_conv", CONVOLUTION), ("attention", ATTENTION))
    for dtype in ("bfloat16", "float32")
    for i, benchmark in enumerate(suite.benchmarks)
    if "sinks" not in benchmark.name
]


@pytest.mark.parametrize("name, benchmark, dtype", BENCHMARKS)
def test_lower_benchmarks_for_a_tpu(tpu_blocks, monkeypatch, name, benchmark, dtype):
    """With the blocks of a TPU and packed rows."""
    for setting in tpu_blocks:
        monkeypatch.setattr(*setting)
    monkeypatch.setattr(mosaic_tpu, "INTERPRET", False)
    drawn = benchmark.draw(np.random.default_rng(0), 1, 2, 1)
    drawn.pop("segment_ids", None)
    size = benchmark.batch, benchmark.time
    arguments = {
        key: jax.ShapeDtypeStruct((*size, *value.shape[2:]) if value.ndim > 2 else value.shape, dtype)
        for key, value in drawn.items()
    }
    function = functools.partial(SUITES[name].function, **benchmark.options)
    kernels = kernels_lowered(function, arguments, jax.ShapeDtypeStruct(size, jnp.int32))
    assert kernels == {"short_conv": 2, "attention": 3}[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, case", [pytest.param(name, case, id=f"{name}-{case.name}") for name, case in CASES]
)
def test_lower_small_calls_for_a_tpu(tpu_blocks, monkeypatch, name, case):
    """Lengths and widths that are no multiples of anything."""
    for setting in tpu_blocks:
        monkeypatch.setattr(*setting)
    monkeypatch.setattr(mosaic_tpu, "INTERPRET", False)
    for time, dtype in ((700, "float32"), (37, "bfloat16")):
        arguments = shared.cast(shared.draw(case, 2, time), dtype)
        ids = jax.ShapeDtypeStruct((2, time), jnp.int32) if dtype == "float32" else None
        function = functools.partial(SUITES[name].function, **case.options)
        assert kernels_lowered(function, arguments, ids) == {"short_conv": 2, "attention": 3}[name]


def test_float32_is_not_rounded(tpu_blocks, monkeypatch):
    """All products of the library's kernels ask for float32, in both passes, where the arguments are float32."""
    monkeypatch.setattr(mosaic_tpu, "INTERPRET", False)
    for dtype, wanted in ((jnp.float32, jax.lax.Precision.HIGHEST), (jnp.bfloat16, None)):
        q = jax.ShapeDtypeStruct((1, 128, 1, 64), dtype)

        def loss(q):
            return attention(q, q, q, causal=True, impl="tpu").astype(jnp.float32).sum()

        found = set(products(jax.make_jaxpr(jax.grad(loss))(q).jaxpr))
        assert found == {None if wanted is None else (wanted, wanted)}


def products(jaxpr):
    """The precision of every product in kernels of a program."""
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from products(inner)
        if equation.primitive.name == "dot_general":
            yield equation.params["precision"]


PADDED = Segments.of(jnp.ones((1, 3), jnp.int32))


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"mask": Mask(window=2, sink_tokens=1)}, "not sink_tokens"),
        ({"mask": Mask(prefix_lengths=jnp.array([1]))}, "not prefix_lengths"),
        ({"mask": Mask(window=2, dilation=2)}, "not dilation"),
        ({"logits": Logits(slopes=jnp.ones(2))}, "not slopes"),
        ({"logits": Logits(bias=jnp.zeros((1, 1, 3, 3)))}, "not bias"),
        ({"tokens": Tokens(kv_lengths=jnp.array([2]))}, "not kv_lengths"),
        ({"mask": Mask(window=2), "segment_ids": PADDED}, "padding='end'"),
        ({"q": jnp.zeros((1, 3, 2, 4), jnp.bfloat16)}, "of one type"),
        ({"v": jnp.zeros((1, 3, 2, 264))}, "up to 256"),
        (
            dict.fromkeys(("q", "k", "v"), jnp.zeros((1, 1 << 16, 1, 1))),
            "512 x 512 blocks; expected at most 65536",
        ),
        (dict.fromkeys(("q", "k", "v"), jnp.zeros((1, 3, 2, 4), jnp.float16)), "float16"),
    ],
)
def test_attention_is_refused_with_the_reason(options, reason):
    arguments = {key: jnp.zeros((1, 3, 2, 4)) for key in ("q", "k", "v")} | {"causal": True} | options
    with pytest.raises(ValueError, match=f"impl='tpu'.*{reason}"):
        attention(**arguments, impl="tpu")


def test_convolutions_are_refused_with_the_reason():
    x, weight = jnp.zeros((1, 3, 8)), jnp.zeros((2, 8))
    with pytest.raises(ValueError, match=r"impl='tpu'.*padding='end'"):
        short_conv(x, weight, segment_ids=PADDED, impl="tpu")
    with pytest.raises(ValueError, match="impl='tpu'.*float16"):
        short_conv(x.astype(jnp.float16), weight, impl="tpu")


def test_automatic_on_a_tpu(monkeypatch):
    """Long sequences of wide layers take the kernels, single steps and short or narrow ones do not."""
    monkeypatch.setattr(mosaic_tpu, "INTERPRET", None)
    monkeypatch.setattr(mosaic_tpu, "LANES", 128)
    with devices.as_on("tpu"):
        for shape, taken in (((2, 512, 256), True), ((2, 1, 256), False), ((2, 512, 5), False)):
            assert (convolution.passed_over_reason(x=jnp.zeros(shape)) is None) is taken
        for shape, dtype, taken in (
            ((2, 512, 4, 128), jnp.bfloat16, True),
            ((2, 512, 4, 128), jnp.float32, False),
            ((2, 1, 4, 128), jnp.bfloat16, False),
            ((2, 512, 4, 16), jnp.bfloat16, False),
        ):
            x = jnp.zeros(shape, dtype)
            assert (splash.passed_over_reason(x, x, x, None) is None) is taken
