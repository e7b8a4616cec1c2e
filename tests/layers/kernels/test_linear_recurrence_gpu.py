"""The Hopper kernels of `linear_recurrence`: under the interpreter and through the compiler here, and on a GPU.

The interpreter fills memory with NaN beforehand, also the outputs. On a GPU, `poisoned` does.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from layers.kernels import devices, dispatch, mosaic_gpu
from layers.kernels.linear_recurrence import IMPLEMENTATIONS, gpu, linear_recurrence, reference
from layers.kernels.linear_recurrence.cases import SUITE
from layers.kernels.linear_recurrence.gpu import kernels as gpu_kernels
from layers.kernels.linear_recurrence.gpu.kernels import Settings
from layers.kernels.segments import Segments
from tests.layers.kernels import test_primitives as shared

SHORT = Settings(steps=8, stages=2, unroll=4, pieces=2, fold=False)
IDS = np.array([[0, 0, 1, 1, 1, 1, 0, 2, 2, 2, 2, 2, 3, 3, 3, 0, 5, 5, 0], [4] * 12 + [1] * 7], np.int32)
by_case = pytest.mark.parametrize("case", SUITE.cases, ids=lambda case: case.name)
INTERPRETED = [c for c in SUITE.cases if c.name not in ("complex", "real_reverse", "large_values")]


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels run in the interpreter, with tiles so short that a small call has several."""
    monkeypatch.setattr(gpu, "FORWARD", SHORT)
    monkeypatch.setattr(gpu, "BACKWARD", SHORT)
    with mosaic_gpu.interpreted():
        yield


def rng_of(*key):
    return np.random.default_rng([7, *key])


def arguments_of(rng, shape, decay_shape, *, complex_a=False, complex_x=False, dtype="float32"):
    """Random arguments with an initial state."""

    def normal(*shape):
        return rng.standard_normal(shape)

    is_complex = complex_a or complex_x
    phase = np.exp(1j * rng.uniform(-np.pi, np.pi, decay_shape)) if complex_a else 1.0
    state = normal(shape[0], shape[2])
    return shared.cast(
        {
            "a": rng.uniform(0.3, 1.0, decay_shape) * phase,
            "x": normal(*shape) + 1j * normal(*shape) if complex_x else normal(*shape),
            "initial_state": state + 1j * normal(*state.shape) if is_complex else state,
        },
        dtype,
    )


def check(arguments, *, tolerance=2e-5, reverse=False, **options):
    """Compares outputs and all gradients with the float64 reference; `options` go to the call."""
    case = shared.SUITES["linear_recurrence"].cases[0]
    case = type(case)(case.name, case.draw, {"reverse": reverse})
    got, want, _ = shared.beside_reference(SUITE, case, "gpu", arguments, **options)
    shared.close(got[0], want[0], tolerance, "outputs")
    for key in want[1]:
        shared.close(got[1][key], want[1][key], tolerance, f"gradient of {key}")
        assert got[1][key].dtype == arguments[key].dtype
    assert got[0][1].dtype in (jnp.float32, jnp.complex64)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[pytest.mark.slow] * (case.name != "real"))
        for case in INTERPRETED
    ],
)
def test_interpreted(interpreted, case):
    arguments = shared.cast(shared.draw(case, 2, IDS.shape[1]), "float32")
    check(arguments, segment_ids=jnp.asarray(IDS), **case.options)


@pytest.mark.slow
def test_interpreted_without_segments(interpreted):
    """Odd lengths of bfloat16 with a decay in float32, one for every step and one for every row."""
    a = arguments_of(rng_of(1), (2, 13, 5), (1, 13, 5))["a"]
    arguments = arguments_of(rng_of(2), (2, 13, 5), (2, 13, 5), dtype="bfloat16")
    check(arguments | {"a": a}, tolerance=1e-2)
    check(arguments_of(rng_of(3), (2, 3, 130), (2, 1, 130), complex_x=True), reverse=True)


# time, channels, whether a is fixed, complex, x complex, reverse, segments
FOLDED = {
    "fixed": (37, 5, True, True, True, False, True),
    "fixed_reverse": (37, 5, True, True, True, True, True),
    "whole": (40, 5, False, False, False, False, False),
    "complex_input_reverse": (37, 24, False, False, True, True, False),
    "three_stretches": (37, 40, True, False, False, True, True),
    "real_input": (64, 8, True, True, False, False, False),
}
FOLDED_IDS = np.repeat(np.array([[0, 1, 1, 2, 2, 0, 3], [1, 1, 1, 1, 2, 0, 0]], np.int32), 10, axis=1)


def folded_arguments(kind, time=None):
    steps, channels, fixed, complex_a, complex_x, reverse, segments = FOLDED[kind]
    steps = time or steps
    decay = (1, 1, channels) if fixed else (2, steps, channels)
    arguments = arguments_of(
        rng_of(8, steps), (2, steps, channels), decay, complex_a=complex_a, complex_x=complex_x
    )
    ids = jnp.asarray(np.resize(FOLDED_IDS, (2, steps))) if segments else None
    return arguments, {"reverse": reverse, "segment_ids": ids}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.slow] * (kind != "fixed_reverse")) for kind in FOLDED],
)
def test_stretches_of_time_in_the_lanes(monkeypatch, kind):
    settings = Settings(steps=8, stages=2, unroll=4, fold=True)
    monkeypatch.setattr(gpu, "FORWARD", settings)
    monkeypatch.setattr(gpu, "BACKWARD", settings)
    arguments, options = folded_arguments(kind)
    assert gpu._kernels(arguments["x"].shape, jnp.float32, settings) is gpu.folded
    with mosaic_gpu.interpreted():
        check(arguments, **options)


def test_few_complex_channels_are_folded():
    def folded(*shape, dtype=jnp.complex64, settings=gpu.FORWARD):
        return gpu._kernels(shape, dtype, settings) is gpu.folded

    assert gpu.FORWARD.fold is gpu.BACKWARD.fold is None
    assert folded(50, 2048, 8)
    assert folded(1, 704, 57)  # padded to 64
    assert folded(1, 16, 8)
    assert folded(50, 2048, 8, dtype=jnp.float32, settings=Settings(fold=True))
    assert not folded(1, 704, 65)
    assert not folded(1, 15, 8)
    assert not folded(50, 2048, 8, dtype=jnp.float32)
    assert not folded(50, 2048, 8, settings=Settings(fold=False))


@pytest.mark.slow
def test_interpreted_under_transformations(interpreted):
    arguments = arguments_of(rng_of(4), (2, 11, 5), (2, 11, 5))
    want = reference.linear_recurrence(*arguments.values(), None, False)

    def run(arguments):
        return linear_recurrence(**arguments, impl="gpu")

    rows = jax.tree.map(lambda v: v[:, None], arguments)
    mapped = jax.jit(jax.vmap(run))(rows)
    shared.close(jax.tree.map(lambda v: v[:, 0], mapped), want, 1e-6, "vmap")
    shared.close(over_one_device(run)(arguments), want, 1e-6, "shard_map")


def over_one_device(function):
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=P("data"), out_specs=P("data")))


@pytest.mark.parametrize("fenced", [True, False])
def test_races(monkeypatch, capsys, fenced):
    """Buffers are used again only after all lanes and copies are done with them; without fences that shows."""
    if not fenced:
        monkeypatch.setattr(mosaic_gpu.plgpu, "commit_smem", lambda: None)
    settings = Settings(steps=8, stages=2, pieces=1)
    arguments = arguments_of(rng_of(5), (1, 29, 8), (1, 29, 8))

    def loss(a, x, state):
        h, final = gpu.linear_recurrence(a, x, state, None, False, settings, settings)
        return h.sum() + final.sum()

    with mosaic_gpu.interpreted(detect_races=True):
        jax.block_until_ready(jax.jit(jax.grad(loss, (0, 1, 2)))(*arguments.values()))
    assert ("RACE DETECTED" in capsys.readouterr().out) != fenced


@pytest.mark.sample(3)
@pytest.mark.parametrize("case", INTERPRETED[:3], ids=lambda case: case.name)
def test_lowers_for_a_gpu(case):
    """The compiler's front end takes both passes, in pieces and with segments."""
    arguments = shared.cast(shared.draw(case, 2, 200), "float32")
    ids = jnp.ones((2, 200), jnp.int32)
    settings = Settings(unroll=1, pieces=3, fold=False)

    def run(a, x, state):
        reverse = case.options.get("reverse", False)
        return gpu.linear_recurrence(
            a, x, state, Segments.of(ids), reverse, forward=settings, backward=settings
        )

    def both(*arguments):
        output, pullback = jax.vjp(run, *arguments)
        return output, pullback(output)

    traced = jax.jit(both).trace(*(arguments[name] for name in ("a", "x", "initial_state")))
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2") == 4


@pytest.mark.parametrize("decay, spec", [((8, 24, 256), P()), ((1, 1, 256), P())], ids=["full", "constant"])
def test_explicit_mesh(decay, spec):
    """Rows and channels are shared out as x is, whatever the sharding of the decay; time is not."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), (jax.sharding.AxisType.Explicit,) * 2)

    def array(shape, spec, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

    def loss(a, x, state, ids):
        return sum(v.sum() for v in gpu.linear_recurrence(a, x, state, Segments.of(ids), False, SHORT, SHORT))

    rows = P("data", None, "model")
    ids = array((8, 24), P("data"), jnp.int32)
    with jax.set_mesh(mesh):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(
            array(decay, spec), array((8, 24, 256), rows), array((8, 256), P("data", "model")), ids
        )
        lowered = traced.lower(lowering_platforms=("cuda",))
        assert "tensor<2x24x128xf32>" in lowered.as_text()
        assert [v.sharding.spec for v in lowered.out_info] == [P(None, None, None), rows, P("data", "model")]
        sharded_in_time = jnp.zeros((2, 16, 8), out_sharding=P(None, "data"))
        assert "expected whole rows" in gpu.unsupported_reason(sharded_in_time, sharded_in_time, None)


def test_refusals(monkeypatch, caplog):
    """The reason is given when asked for by name, and logged once; then XLA computes."""
    arguments = arguments_of(rng_of(6), (2, 5, 4), (2, 5, 4))
    with pytest.raises(ValueError, match="impl='gpu' .* needs a Hopper GPU; JAX computes on cpu"):
        linear_recurrence(**arguments, impl="gpu")
    with pytest.raises(ValueError, match="x has dtype float16"):
        linear_recurrence(arguments["a"], arguments["x"].astype(jnp.float16), impl="gpu")

    def probe():
        raise NotImplementedError("a new interface\nmore")

    monkeypatch.setattr(gpu, "_probe", probe)
    chosen = dataclasses.replace(IMPLEMENTATIONS["gpu"], passed_over_reason=lambda **_: None)
    monkeypatch.setitem(IMPLEMENTATIONS, "gpu", chosen)
    dispatch.log_once.cache_clear()  # another test may have logged the same reason
    with caplog.at_level("INFO", logger="layers"), devices.as_on("gpu"):
        for _ in range(2):
            linear_recurrence(**arguments)
            with pytest.raises(
                ValueError, match="cannot build the kernel: NotImplementedError: a new interface$"
            ):
                linear_recurrence(**arguments, impl="gpu")
    assert len([r for r in caplog.records if "a new interface" in r.getMessage()]) == 1


@pytest.mark.slow
def test_layers_of_a_model_share_their_kernels():
    """A deeper stack of the same calls has no more kernels to lower."""

    def kernels(depth):
        def loss(a, x):
            for _ in range(depth):
                x, _ = gpu.linear_recurrence(a, x, None, None, False)
            return x.sum()

        shape = jax.ShapeDtypeStruct((1, 70, 8), jnp.float32)
        traced = jax.jit(jax.grad(loss, (0, 1))).trace(shape, shape)
        return traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2")

    assert kernels(4) == kernels(2) > 0


def test_automatic_for_long_calls(monkeypatch):
    def taken(a, x, state=None):
        return gpu.passed_over_reason(a=a, x=x, initial_state=state) is None

    real, other = jnp.ones((1, 64, 8)), jnp.ones((1, 64, 8), jnp.complex64)
    assert not taken(real, real)
    with devices.as_on("gpu"):
        assert taken(real, real)
        assert not taken(other, real)
        assert not taken(real, real, other[:, 0])
        fixed, long = other[:, :1], jax.ShapeDtypeStruct((1, 704, 8), jnp.complex64)
        assert taken(fixed, long)
        assert not taken(long, long)
        assert not taken(fixed, long.update(shape=(1, 703, 8)))
        for time in (48, 65):
            other_length = jnp.ones((1, time, 8))
            assert taken(other_length, other_length) == (time > 64)
        monkeypatch.setattr(devices, "count", lambda: 2)
        assert not taken(real, real)


def test_time_is_cut_where_rows_are_few():
    """On 132 processors: not where the blocks fill half of them, and into 64 pieces where there are two."""

    def pieces(shape):
        groups = ((jax.ShapeDtypeStruct(shape, jnp.float32),),) * 2
        return gpu_kernels._plan(shape, gpu.FORWARD, False, groups, groups[:1], groups, 20.0).pieces

    assert pieces((8, 4096, 2048)) == pieces((4, 4096, 2048)) == 1
    assert pieces((1, 65536, 256)) > 48


def test_probe_lowers():
    gpu._probe()


def poisoned(size):
    """Fills memory that the next results will be put in with NaN, and gives it back."""
    filled = [jnp.full((size,), jnp.nan, jnp.float32) for _ in range(4)]
    jax.block_until_ready(filled)
    for array in filled:
        array.delete()


@pytest.mark.gpu
@by_case
def test_shared_suite(case):
    poisoned(2**26)
    at = {"name": "linear_recurrence", "case": case, "impl": "gpu"}
    for time in (1, 2, 37, 130):
        shared.test_forward_and_gradients_match_float64_reference(**at, time=time)
    shared.test_bfloat16_inputs(**at)
    shared.test_segment_gradients_match_reference(**at)
    shared.test_empty_and_single_sequences(**at)


@pytest.mark.gpu
@pytest.mark.parametrize("case", INTERPRETED[:3], ids=lambda case: case.name)
def test_cuts_and_packings(case):
    at = {"name": "linear_recurrence", "case": case, "impl": "gpu"}
    shared.test_cut_anywhere(**at)
    shared.test_packed_equals_separate_and_padding_is_skipped(**at)


SHAPES = {
    "several blocks": ((3, 1000, 300), (3, 1000, 300)),
    "one row, in pieces": ((1, 4099, 136), (1, 4099, 136)),
    "one decay for all": ((5, 777, 8), (1, 1, 8)),
    "a decay a row": ((5, 777, 128), (5, 1, 128)),
    "a decay a step": ((4, 515, 40), (1, 515, 40)),
    "many rows": ((300, 33, 24), (300, 33, 24)),
}
KINDS = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "complex decay": {"complex_a": True},
    "complex input": {"complex_x": True},
    "complex": {"complex_a": True, "complex_x": True},
}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_on_gpu(shape, kind):
    """Fresh random inputs, in either direction, with segments or without."""
    rng = np.random.default_rng()
    full, decay = SHAPES[shape]
    tolerance = 1e-2 if kind == "bfloat16" else 2e-5
    ids = jnp.asarray(
        np.cumsum(rng.random(full[:2]) < 0.01, axis=1) * (rng.random(full[:2]) < 0.9), jnp.int32
    )
    number = list(SHAPES).index(shape) + list(KINDS).index(kind)
    options = {"segment_ids": ids} if number % 2 else {}
    poisoned(4 * int(np.prod(full)))
    arguments = arguments_of(rng, full, decay, **KINDS[kind])
    check(arguments, tolerance=tolerance, reverse=number % 4 < 2, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("vector", [1, 2])
@pytest.mark.parametrize("stages, steps, pieces", [(2, 8, 1), (3, 16, 5), (6, 32, None), (4, 64, 2)])
def test_layouts_on_gpu(monkeypatch, vector, stages, steps, pieces):
    settings = Settings(vector=vector, stages=stages, steps=steps, pieces=pieces)
    monkeypatch.setattr(gpu, "FORWARD", settings)
    monkeypatch.setattr(gpu, "BACKWARD", settings)
    rng = np.random.default_rng()
    arguments = arguments_of(rng, (2, 333, 520), (2, 333, 520))
    ids = jnp.asarray(np.cumsum(rng.random((2, 333)) < 0.02, axis=1), jnp.int32)
    poisoned(2**20)
    check(arguments, segment_ids=ids)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", FOLDED)
def test_stretches_of_time_in_the_lanes_on_gpu(monkeypatch, kind):
    monkeypatch.setattr(gpu, "FORWARD", Settings(fold=True))
    monkeypatch.setattr(gpu, "BACKWARD", Settings(stages=3, fold=True))
    arguments, options = folded_arguments(kind, 1003)
    poisoned(4 * arguments["x"].nbytes)
    check(arguments, **options)


@pytest.mark.gpu
def test_transformations_on_gpu():
    arguments = arguments_of(np.random.default_rng(), (8, 50, 40), (8, 50, 40))
    want = jax.tree.map(np.asarray, reference.linear_recurrence(*arguments.values(), None, False))

    def run(arguments):
        return linear_recurrence(**arguments, impl="gpu")

    def loss(arguments):
        return sum(leaf.sum() for leaf in run(arguments))

    split = jax.tree.map(lambda v: v.reshape(2, 4, *v.shape[1:]), arguments)
    merge = functools.partial(jax.tree.map, lambda v: v.reshape(8, *v.shape[2:]))
    shared.close(jax.jit(run)(arguments), want, 1e-6, "jit")
    shared.close(merge(jax.vmap(run)(split)), want, 1e-6, "vmap")
    shared.close(merge(jax.lax.map(run, split)), want, 1e-6, "scan")
    shared.close(over_one_device(run)(arguments), want, 1e-6, "shard_map")
    plain = jax.grad(loss)(arguments)
    for name, transformed in {
        "checkpoint": jax.grad(jax.checkpoint(loss))(arguments),
        "vmap": merge(jax.vmap(jax.grad(loss))(split)),
        "shard_map": over_one_device(jax.grad(loss))(arguments),
    }.items():
        shared.close(transformed, jax.tree.map(np.asarray, plain), 1e-6, f"gradients under {name}")
