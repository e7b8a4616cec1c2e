"""The Hopper kernels of `short_conv`: under the interpreter and through the compiler here, and on a GPU.

The interpreter fills memory with NaN beforehand, also the outputs. On a GPU, `poisoned` does.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from layers.kernels import devices, mosaic_gpu
from layers.kernels.segments import Segments
from layers.kernels.short_conv import gpu, short_conv
from layers.kernels.short_conv.cases import SUITE
from layers.kernels.short_conv.gpu.tiles import Settings, plan_of
from tests.layers.kernels import test_primitives as shared
from tests.layers.kernels.test_linear_recurrence_gpu import poisoned

SHORT = Settings(vector=1, steps=8, stages=2, pieces=2)
# Segments that begin at the borders of pieces (16 of 29 tokens) and of tiles (8), and are shorter than taps reach.
IDS = np.array(
    [[1] * 7 + [2] * 2 + [3] * 7 + [4] * 9 + [0] * 4, [7] * 17 + [3] + [2] + [9] * 10, [5] * 2 + [0] * 27],
    np.int32,
)


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels run in the interpreter, with tiles so short that a small call has several."""
    monkeypatch.setattr(gpu, "FORWARD", SHORT)
    monkeypatch.setattr(gpu, "BACKWARD", SHORT)
    with mosaic_gpu.interpreted():
        yield


def arguments_of(
    rng, shape, taps, *, bias=True, state=True, dtype="float32", weights="float32", given="float32"
):
    """Random arguments; `given` is the type of the state."""
    arguments = {
        "x": jnp.asarray(rng.standard_normal(shape), dtype),
        "weight": jnp.asarray(rng.standard_normal((taps, shape[2])), weights),
    }
    if bias:
        arguments["bias"] = jnp.asarray(rng.standard_normal(shape[2]), weights)
    if state:
        arguments["initial_state"] = jnp.asarray(rng.standard_normal((shape[0], taps - 1, shape[2])), given)
    return arguments


def at_end(ids):
    return None if ids is None else Segments.of(jnp.asarray(ids), padding="end")


def check(arguments, *, tolerance=2e-5, ids=None, activation="silu"):
    """Compares outputs, the state and all gradients with the float64 reference."""
    case = dataclasses.replace(SUITE.cases[0], options={"activation": activation})
    got, want, _ = shared.beside_reference(SUITE, case, "gpu", arguments, segment_ids=at_end(ids))
    shared.close(got[0], want[0], tolerance, "outputs")
    for key in want[1]:
        shared.close(got[1][key], want[1][key], tolerance, f"gradient of {key}")
        assert got[1][key].dtype == arguments[key].dtype
    assert got[0][0].dtype == arguments["x"].dtype
    assert got[0][1].dtype == jnp.float32


# shape, taps, activation, whether there are a bias, a state, segments
CALLS = {
    "state_and_segments": ((3, 29, 130), 4, "silu", True, True, True),
    "segments": ((3, 29, 8), 4, "silu", False, False, True),
    "whole": ((2, 37, 8), 4, "silu", True, False, False),
    "two_taps": ((3, 29, 8), 2, None, True, True, True),
    "eight_taps": ((3, 29, 12), 8, "silu", False, True, True),
    "channels_of_a_tile": ((2, 21, 128), 3, "silu", False, True, False),
    "odd_channels": ((2, 16, 5), 5, None, False, False, False),
    "one_token": ((2, 1, 8), 4, "silu", True, True, False),
    "transformed": ((2, 11, 8), 3, "silu", False, True, False),
}


def call_of(name, **options):
    shape, taps, activation, bias, state, segments = CALLS[name]
    rng = np.random.default_rng([3, *shape, taps])
    arguments = arguments_of(rng, shape, taps, bias=bias, state=state, **options)
    return arguments, {"activation": activation, "ids": IDS if segments else None}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "state_and_segments")) for n in CALLS]
)
def test_interpreted(interpreted, name):
    arguments, options = call_of(name)
    check(arguments, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["segments", "channels_of_a_tile"])
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_interpreted_bfloat16(interpreted, monkeypatch, name, weights):
    wide = dataclasses.replace(SHORT, vector=2)
    monkeypatch.setattr(gpu, "FORWARD", wide)
    monkeypatch.setattr(gpu, "BACKWARD", wide)
    arguments, options = call_of(name, dtype="bfloat16", weights=weights)
    check(arguments, tolerance=1e-2, **options)


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("activation", ["silu", None])
def test_other_tokens_reach_nothing(interpreted, activation, value):
    """What is not finite in other segments and at padding reaches no output, state or gradient."""
    arguments = arguments_of(np.random.default_rng(4), (2, 29, 8), 4)
    ids = IDS[:2]
    chosen = jnp.asarray((ids == 3) | (ids == 4) | (ids == 9))[..., None]

    def run(impl, arguments):
        def loss(arguments):
            y, final = short_conv(**arguments, activation=activation, segment_ids=at_end(ids), impl=impl)
            shown = jnp.where(chosen, y, 0)
            return (shown**2).sum() + (final**2).sum(), (shown, final, jnp.where(ids[..., None], 0, y))

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(arguments)

    want = run("xla", arguments)
    spoiled = {
        "x": jnp.where(chosen, arguments["x"], value),
        "initial_state": jnp.full_like(arguments["initial_state"], value),
    }
    got = run("gpu", arguments | spoiled)
    shared.close(got, jax.tree.map(np.asarray, want), 1e-6, f"beside {value}")
    assert not np.asarray(jnp.where(chosen, 0, got[1]["x"])).any()
    assert np.abs(got[1]["x"]).any(2)[np.asarray(chosen[..., 0])].all()


@pytest.mark.slow
def test_interpreted_under_transformations(interpreted):
    """Gradients of weights that devices share are summed over them."""
    arguments, _ = call_of("transformed")
    *moving, weight = (arguments[name] for name in ("x", "initial_state", "weight"))

    def gradients(impl):
        def loss(x, state, weight):
            results = short_conv(x, weight, activation="silu", initial_state=state, impl=impl)
            return sum((v**2).sum() for v in results)

        return jax.grad(loss, (0, 1, 2))

    want = jax.tree.map(np.asarray, gradients("xla")(*moving, weight))
    each = jax.vmap(gradients("gpu"), in_axes=(0, 0, None))
    *got, dweight = jax.jit(each)(*(v[:, None] for v in moving), weight)
    shared.close((*(v[:, 0] for v in got), dweight.sum(0)), want, 1e-5, "vmap")
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    specs = P("data"), P("data"), P()
    inside = jax.jit(jax.shard_map(gradients("gpu"), mesh=mesh, in_specs=specs, out_specs=specs))
    shared.close(inside(*moving, weight), want, 1e-5, "shard_map")


@pytest.mark.sample(2)
@pytest.mark.parametrize("fenced", [True, False])
def test_races(monkeypatch, capsys, fenced):
    """Buffers are used again only after all lanes and copies are done with them; without fences that shows."""
    if not fenced:
        monkeypatch.setattr(mosaic_gpu.plgpu, "commit_smem", lambda: None)
    settings = Settings(vector=1, steps=8, stages=2, pieces=1)
    arguments = arguments_of(np.random.default_rng(5), (1, 29, 8), 3)

    def both(*arguments):
        y, pullback = jax.vjp(
            lambda *a: gpu.short_conv(*a[:3], "silu", a[3], at_end(IDS[1:2]), settings, settings)[0],
            *arguments,
        )
        return y, pullback(y)

    with mosaic_gpu.interpreted(detect_races=True):
        jax.block_until_ready(jax.jit(both)(*arguments.values()))
    assert ("RACE DETECTED" in capsys.readouterr().out) != fenced


@pytest.mark.slow
@pytest.mark.parametrize("dtype, vector, taps", [("bfloat16", 2, 4), ("float32", 1, 8)])
def test_lowers_for_a_gpu(dtype, vector, taps):
    """The compiler's front end takes both passes, with a ragged end, a state and segments."""
    settings = Settings(vector=vector, pieces=3)
    arguments = arguments_of(np.random.default_rng(6), (2, 200, 136), taps, dtype=dtype)
    ids = jnp.ones((2, 200), jnp.int32)

    def both(ids, *arguments):
        def run(x, weight, bias, state):
            return gpu.short_conv(x, weight, bias, "silu", state, at_end(ids), settings, settings)[0]

        output, pullback = jax.vjp(run, *arguments)
        return output, pullback(output)

    traced = jax.jit(both).trace(ids, *arguments.values())
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2") == 2


@pytest.mark.slow
def test_explicit_mesh():
    """Rows and channels are shared out as x is, whatever the sharding of the weights; time is not."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), (jax.sharding.AxisType.Explicit,) * 2)

    def array(shape, spec, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

    def loss(x, weight, bias, state, ids):
        return sum(v.sum() for v in gpu.short_conv(x, weight, bias, "silu", state, at_end(ids), SHORT, SHORT))

    rows = P("data", None, "model")
    inputs = (
        array((8, 24, 256), rows),
        array((4, 256), P()),
        array((256,), P("model")),
        array((8, 3, 256), P()),
        array((8, 24), P("data"), jnp.int32),
    )
    with jax.set_mesh(mesh):
        traced = jax.jit(jax.grad(loss, (0, 1, 2, 3))).trace(*inputs)
        lowered = traced.lower(lowering_platforms=("cuda",))
        assert "tensor<2x24x128xf32>" in lowered.as_text()
        specs = [v.sharding.spec for v in lowered.out_info]
        assert specs[0] == rows
        assert specs[2] == P("model")
        x = jnp.zeros((2, 16, 8), out_sharding=P(None, "data"))
        assert "expected whole rows" in gpu.unsupported_reason(x, jnp.zeros((4, 8)), None, None, None)


def test_refusals():
    arguments, _ = call_of("whole")
    with pytest.raises(ValueError, match="impl='gpu' .* needs a Hopper GPU; JAX computes on cpu"):
        short_conv(**arguments, impl="gpu")
    with pytest.raises(ValueError, match="weight has dtype float16; expected float32 or bfloat16"):
        short_conv(**arguments | {"weight": arguments["weight"].astype(jnp.float16)}, impl="gpu")
    with pytest.raises(ValueError, match="padding may stand anywhere; expected .*padding='end'"):
        short_conv(**arguments, segment_ids=jnp.ones((2, 37), jnp.int32), impl="gpu")


def test_automatic_for_long_calls(monkeypatch):
    def reason(*shape, dtype=jnp.float32):
        return gpu.passed_over_reason(x=jnp.zeros(shape, dtype))

    assert "needs a Hopper GPU" in reason(1, 64, 8)
    with devices.as_on("gpu"):
        assert reason(1, 64, 8) is reason(1, 100, 12) is None
        assert "from 64 on" in reason(1, 63, 8)
        assert "multiples of 8" in reason(1, 64, 12, dtype=jnp.bfloat16)
        monkeypatch.setattr(devices, "count", lambda: 2)
        assert "no mesh" in reason(1, 64, 8)


def test_time_is_cut_into_a_piece_for_every_place():
    """Four programs on each of 132 processors: one wave of as many pieces, and never a tile without tokens."""

    def pieces(*shape):
        plan = plan_of(shape, 3, gpu.FORWARD, 2, 2, 2)
        steps = plan.settings.steps
        assert (plan.pieces - 1) * plan.tiles * steps < shape[1] <= plan.pieces * plan.tiles * steps
        return plan.pieces

    assert 400 < 24 * pieces(8, 4096, 768) <= 528
    assert pieces(1, 100, 256) == 7
    assert pieces(64, 4096, 4096) <= 4


def test_probe_lowers():
    gpu._probe()


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_calls_on_gpu(name):
    poisoned(2**20)
    arguments, options = call_of(name)
    check(arguments, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("case", SUITE.cases, ids=lambda case: case.name)
def test_shared_suite(case):
    poisoned(2**20)
    at = {"name": "short_conv", "case": case, "impl": "gpu"}
    for time in (1, 2, 37, 130):
        shared.test_forward_and_gradients_match_float64_reference(**at, time=time)
    shared.test_bfloat16_inputs(**at)
    shared.test_cut_anywhere(**at)
    shared.test_empty_and_single_sequences(**at)


SHAPES = {
    "several_blocks": (3, 1000, 776),
    "one_row_in_pieces": (1, 4099, 136),
    "channels_of_a_tile": (5, 777, 256),
    "many_rows": (300, 70, 24),
}
TYPES = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16_throughout": {"dtype": "bfloat16", "weights": "bfloat16", "given": "bfloat16"},
    "narrow_weights": {"weights": "bfloat16"},
}


def packed(rng, batch, time):
    """Rows of many segments, some shorter than taps reach, with padding of any length at the end."""
    ids = 1 + np.cumsum(rng.random((batch, time)) < 0.05, axis=1)
    return np.where(np.arange(time) < rng.integers(0, time + 1, (batch, 1)), ids, 0).astype(np.int32)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_on_gpu(name, kind):
    """Fresh random inputs of any width, with segments or without, with a state or without."""
    rng = np.random.default_rng()
    shape = SHAPES[name]
    number = list(SHAPES).index(name) + list(TYPES).index(kind)
    poisoned(4 * int(np.prod(shape)))
    arguments = arguments_of(
        rng, shape, int(rng.integers(2, 9)), bias=number % 2 == 0, state=number % 3 > 0, **TYPES[kind]
    )
    ids = packed(rng, *shape[:2]) if number % 4 < 2 else None
    check(arguments, tolerance=2e-5 if kind == "float32" else 1e-2, ids=ids)


@pytest.mark.gpu
@pytest.mark.parametrize("vector", [1, 2])
@pytest.mark.parametrize(
    "stages, steps, unroll, pieces", [(2, 8, 8, 1), (3, 16, 16, 5), (6, 32, 8, None), (1, 64, 16, 2)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layouts_on_gpu(monkeypatch, dtype, vector, stages, steps, unroll, pieces):
    settings = Settings(vector=vector, stages=stages, steps=steps, unroll=unroll, pieces=pieces)
    monkeypatch.setattr(gpu, "FORWARD", settings)
    monkeypatch.setattr(gpu, "BACKWARD", settings)
    rng = np.random.default_rng()
    poisoned(2**20)
    arguments = arguments_of(rng, (2, 333, 520), 4, dtype=dtype)
    check(arguments, ids=packed(rng, 2, 333), tolerance=2e-5 if dtype == "float32" else 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("activation", ["silu", None])
def test_other_tokens_reach_nothing_on_gpu(activation, value):
    test_other_tokens_reach_nothing(None, activation, value)


@pytest.mark.gpu
def test_transformations_on_gpu():
    test_interpreted_under_transformations(None)
