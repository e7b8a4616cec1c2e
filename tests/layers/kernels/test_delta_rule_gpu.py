"""The Hopper kernels of `delta_rule`: under the interpreter and through the compiler here, and on a GPU.

The interpreter fills memory with NaN beforehand, also the outputs. On a GPU, `poisoned` does.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from layers.kernels import devices, mosaic_gpu
from layers.kernels.delta_rule import DELTA_RULE, delta_rule, gpu
from layers.kernels.delta_rule.cases import SUITE
from layers.kernels.delta_rule.gpu import Settings
from layers.kernels.segments import Segments
from tests.layers.kernels import test_primitives as shared
from tests.layers.kernels.test_linear_recurrence_gpu import over_one_device, poisoned

TAKEN = [case for case in SUITE.cases if "channel" not in case.name]
TOLERANCE = shared.TOLERANCE["bfloat16"]
SHORT = Settings(keep=False, forward=2, states=2, backward=1, workers=1)
by_case = pytest.mark.parametrize("case", TAKEN, ids=lambda case: case.name)


def arguments_of(rng, batch, time, *, groups=1, heads=2, key_dim=64, value_dim=64, decay=True):
    """Random arguments in bfloat16 with an initial state; keys of norm 1."""
    k = rng.standard_normal((batch, time, groups, key_dim))
    arguments = {
        "q": rng.standard_normal(k.shape),
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": rng.standard_normal((batch, time, heads, value_dim)),
        "beta": rng.uniform(0.05, 0.95, (batch, time, heads)),
        "initial_state": rng.standard_normal((batch, heads, key_dim, value_dim)),
    }
    if decay:
        arguments["log_decay"] = -rng.exponential(0.2, (batch, time, heads))
    return shared.cast(arguments, "bfloat16")


def ids_of(rng, batch, time, often=0.03):
    """Packed segments with padding in between."""
    real = rng.random((batch, time)) < 0.9
    return jnp.asarray((1 + np.cumsum(rng.random((batch, time)) < often, axis=1)) * real, jnp.int32)


def check(arguments, tolerance=TOLERANCE, **options):
    """Compares outputs and all gradients with the float64 reference; `options` go to the call."""
    case = dataclasses.replace(TAKEN[0], options={})
    got, want, weights = shared.beside_reference(SUITE, case, "gpu", arguments, **options)
    shared.close(got[0], want[0], tolerance, "outputs")
    shared.close_gradients(got[1], want[1], arguments, want[0], weights, tolerance)
    for name, gradient in got[1].items():
        assert gradient.dtype == arguments[name].dtype
    assert [x.dtype for x in got[0]] == [jnp.bfloat16, jnp.float32]


@pytest.mark.slow
@by_case
def test_interpreted(case):
    """Segments, padding and an odd length, in two chunks."""
    arguments = shared.cast(shared.draw(case, 1, 90), "bfloat16")
    with mosaic_gpu.interpreted():
        check(arguments, segment_ids=ids_of(np.random.default_rng(1), 1, 90), **case.options)


@pytest.mark.slow
def test_interpreted_wide_heads():
    """Heads that take two warpgroups, three chunks, heads that share a key, no segments."""
    rng = np.random.default_rng(2)
    with mosaic_gpu.interpreted():
        check(arguments_of(rng, 1, 150, key_dim=128, value_dim=80))


@pytest.mark.slow
@pytest.mark.parametrize("pieces, value_dim", [(1, 150), (2, 200)])
def test_interpreted_values_in_parts(monkeypatch, pieces, value_dim):
    """Heads of three and of two parts, which share inverses and decays; in two chunks, with segments."""
    in_pieces(monkeypatch, pieces)
    rng = np.random.default_rng(12)
    arguments = arguments_of(rng, 1, 90, heads=2, key_dim=40, value_dim=value_dim)
    with mosaic_gpu.interpreted():
        check(arguments, segment_ids=ids_of(rng, 1, 90))


@pytest.fixture
def in_turn(monkeypatch):
    """Blocks take as many chunks in turn as on a GPU they would if there were more of them; JAX forgets it afterwards."""
    jax.clear_caches()
    for kernels in (gpu.forward_kernels, gpu.gradient_kernel):
        monkeypatch.setattr(kernels, "in_turn", lambda chunks, most: most)
    yield
    jax.clear_caches()


@pytest.mark.slow
@pytest.mark.parametrize("key_dim, value_dim", [(64, 64), (128, 128), (64, 128)])
def test_interpreted_chunks_in_turn(in_turn, monkeypatch, key_dim, value_dim):
    """Five chunks, of which blocks take two, or one warpgroup four, in turn."""
    monkeypatch.setattr(gpu, "SETTINGS", Settings(turns=2, workers=1))
    rng = np.random.default_rng(11)
    arguments = arguments_of(rng, 1, 300, heads=1, key_dim=key_dim, value_dim=value_dim)
    with mosaic_gpu.interpreted():
        check(arguments, segment_ids=ids_of(rng, 1, 300))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [Settings(), Settings(keep=False, workers=1)])
def test_interpreted_keeping_what_the_forward_pass_computed(monkeypatch, settings):
    monkeypatch.setattr(gpu, "SETTINGS", settings)
    with mosaic_gpu.interpreted():
        check(arguments_of(np.random.default_rng(7), 1, 90, heads=1))


def in_pieces(monkeypatch, pieces, **settings):
    monkeypatch.setattr(gpu, "SETTINGS", Settings(pieces=pieces, **settings))


@pytest.mark.slow
@pytest.mark.parametrize(
    "pieces, decay, often",
    [
        (5, False, None),
        pytest.param(3, True, None, marks=pytest.mark.slow),
        pytest.param(5, True, 0.02, marks=pytest.mark.slow),
        pytest.param(2, False, 0.2, marks=pytest.mark.slow),
    ],
)
def test_interpreted_in_pieces(monkeypatch, pieces, decay, often):
    """Pieces of one or two chunks, the last one shorter; without decay the first state reaches the last piece."""
    in_pieces(monkeypatch, pieces)
    rng = np.random.default_rng(9)
    ids = None if often is None else ids_of(rng, 1, 300, often)
    with mosaic_gpu.interpreted():
        check(arguments_of(rng, 1, 300, heads=1, decay=decay), segment_ids=ids)


@pytest.mark.slow
def test_interpreted_in_pieces_where_segments_start_between_them(monkeypatch):
    """Two rows, heads that share a key, more keys than values; padding before, at and after the start of a piece."""
    in_pieces(monkeypatch, 3)
    rng = np.random.default_rng(10)
    ids = np.repeat(
        [[3] * 64 + [4] * 60 + [0] * 8 + [4] * 60, [0] * 70 + [1] * 50 + [0] * 20 + [2] * 52], 1, 0
    )
    with mosaic_gpu.interpreted():
        check(arguments_of(rng, 2, 192, key_dim=128, value_dim=40), segment_ids=jnp.asarray(ids))


def test_sums_no_decays_where_there_are_none():
    """XLA would compute sums of zeros while it compiles, for half a minute."""
    beta = jnp.ones((2, 70, 2))
    with_decay, without = (
        str(jax.make_jaxpr(gpu.token_vectors)(beta, log_decay, None)) for log_decay in (-beta, None)
    )
    assert "cumsum" in with_decay
    assert "cumsum" not in without


def test_pieces_fill_the_machine():
    """Chunks a piece: no fewer than there are pieces, and few enough to fill the processors, or all of them."""
    assert gpu.time_pieces.piece_length(512, 8, None) == 32
    assert gpu.time_pieces.piece_length(2048, 1, None) == 46
    assert gpu.time_pieces.piece_length(64, 128, None) == 64
    assert gpu.time_pieces.piece_length(15, 1, None) == 15
    assert gpu.time_pieces.piece_length(10, 128, 3) == 4
    assert gpu.time_pieces.piece_length(2, 1, 5) == 1


@pytest.mark.slow
def test_interpreted_where_inverses_are_large():
    """Keys that are alike and strengths near 2: as right as XLA, which inverts in float32."""
    rng = np.random.default_rng(8)
    arguments = arguments_of(rng, 1, 64, heads=1, decay=False)
    k = 1.0 + 0.5 * rng.standard_normal((1, 64, 1, 64))
    k = jnp.asarray(k / np.linalg.norm(k, axis=-1, keepdims=True), jnp.bfloat16)
    arguments |= {"k": k, "beta": jnp.full((1, 64, 1), 1.9, jnp.float32)}
    want = delta_rule(**jax.tree.map(lambda x: x.astype(jnp.float32), arguments), impl="reference")
    want = jax.tree.map(np.asarray, want)
    with mosaic_gpu.interpreted():
        shared.close(delta_rule(**arguments, impl="gpu"), want, 1.5e-2, "outputs")


@pytest.mark.slow
def test_interpreted_padding_holds_anything():
    """What stands at padding has no influence, not even NaN, and takes no gradient."""
    rng = np.random.default_rng(3)
    ids = jnp.concatenate([jnp.zeros((1, 5), jnp.int32), jnp.ones((1, 20), jnp.int32)], axis=1)
    arguments = arguments_of(rng, 1, 25, heads=1)

    def loss(arguments):
        return sum(x.astype(jnp.float32).sum() for x in delta_rule(**arguments, segment_ids=ids, impl="gpu"))

    spoilt = {
        name: x if name == "initial_state" else x.at[:, :5].set(jnp.nan) for name, x in arguments.items()
    }
    with mosaic_gpu.interpreted():
        got = jax.jit(jax.value_and_grad(loss))(spoilt)
        want = jax.jit(jax.value_and_grad(loss))(arguments)
    shared.close(got, jax.tree.map(np.asarray, want), 0.0, "loss and gradients")
    assert all(not np.asarray(got[1][name])[:, :5].any() for name in got[1] if name != "initial_state")


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [1, 2])
def test_interpreted_under_transformations(monkeypatch, pieces):
    in_pieces(monkeypatch, pieces)
    arguments = arguments_of(np.random.default_rng(4), 2, 20 if pieces == 1 else 70, heads=1)
    want = jax.tree.map(np.asarray, delta_rule(**arguments, impl="reference"))

    def run(arguments):
        return delta_rule(**arguments, impl="gpu")

    with mosaic_gpu.interpreted():
        mapped = jax.jit(jax.vmap(run))(jax.tree.map(lambda x: x[:, None], arguments))
        shared.close(jax.tree.map(lambda x: x[:, 0], mapped), want, TOLERANCE, "vmap")
        shared.close(over_one_device(run)(arguments), want, TOLERANCE, "shard_map")


@pytest.mark.slow
@pytest.mark.parametrize("fenced", [True, False])
def test_races(in_turn, monkeypatch, capsys, fenced):
    """Buffers are used again only after all warpgroups and copies are done with them; without fences that shows."""
    if not fenced:
        monkeypatch.setattr(mosaic_gpu.plgpu, "commit_smem", lambda: None)
    monkeypatch.setattr(gpu, "SETTINGS", SHORT)
    arguments = arguments_of(np.random.default_rng(5), 1, 150, heads=1, value_dim=128)

    def loss(arguments):
        return sum(x.astype(jnp.float32).sum() for x in delta_rule(**arguments, impl="gpu"))

    with mosaic_gpu.interpreted(detect_races=True):
        jax.block_until_ready(jax.jit(jax.grad(loss))(arguments))
    assert ("RACE DETECTED" in capsys.readouterr().out) != fenced


def both(run):
    def passes(*arguments):
        output, pullback = jax.vjp(run, *arguments)
        return output, pullback(output)

    return passes


@pytest.mark.slow
@pytest.mark.parametrize("segments, value_dim", [(True, 128), (False, 128), (True, 192)])
def test_lowers_for_a_gpu(segments, value_dim):
    """The compiler's front end takes both passes: two kernels forward, two backward."""
    shapes = [((2, 200, 2, 128), jnp.bfloat16)] * 2 + [((2, 200, 4, value_dim), jnp.bfloat16)]
    shapes += [((2, 200, 4), jnp.float32)] * 2 + [((2, 4, 128, value_dim), jnp.float32)]
    ids = jnp.ones((2, 200), jnp.int32) if segments else None

    def run(q, k, v, beta, log_decay, state):
        return gpu.delta_rule(q, k, v, beta, log_decay, 0.1, True, state, Segments.of(ids))

    traced = jax.jit(both(run)).trace(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2") == 4


@pytest.mark.slow
@pytest.mark.parametrize("groups, across", [(4, "model"), (1, None)], ids=["heads", "shared"])
def test_explicit_mesh(groups, across):
    """Rows are shared out, and heads if queries and keys have enough; time is not."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), (jax.sharding.AxisType.Explicit,) * 2)

    def array(shape, spec, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

    def run(q, k, v, beta):
        return gpu.delta_rule(q, k, v, beta, None, 0.1, False, None, None)

    rows = P("data", None, "model", None)
    keys = array((8, 70, groups, 64), rows if across else P("data"))
    with jax.set_mesh(mesh):
        traced = jax.jit(both(run)).trace(
            keys, keys, array((8, 70, 4, 64), rows), array((8, 70, 4), P("data", None, "model"), jnp.float32)
        )
        lowered = traced.lower(lowering_platforms=("cuda",))
        heads = 2 if across else 4
        assert f"tensor<2x72x{heads}x64xbf16>" in lowered.as_text()
        assert lowered.out_info[0][0].sharding.spec == P("data", None, across, None)
        in_time = jnp.zeros((2, 16, 1, 64), jnp.bfloat16, out_sharding=P(None, "data"))
        beta = jnp.zeros((2, 16, 1))
        assert "expected whole rows" in gpu.unsupported_reason(in_time, in_time, in_time, beta, None, None)


def test_refusals(monkeypatch):
    """The reason is given when asked for by name; otherwise XLA computes."""
    arguments = arguments_of(np.random.default_rng(6), 1, 5, key_dim=8, value_dim=8)
    with pytest.raises(ValueError, match="impl='gpu' .* needs a Hopper GPU; JAX computes on cpu"):
        delta_rule(**arguments, impl="gpu")
    wide = jnp.zeros((1, 5, 2, 136), jnp.bfloat16)
    for change, message in (
        ({"v": arguments["v"].astype(jnp.float32)}, "v has dtype float32; expected bfloat16"),
        ({"q": wide, "k": wide, "initial_state": None}, "k has 136 features a head; expected at most 128"),
    ):
        with pytest.raises(ValueError, match=message):
            delta_rule(**arguments | change, impl="gpu")
    with jax.enable_x64(True), pytest.raises(ValueError, match="beta has dtype float64"):
        delta_rule(**arguments | {"beta": arguments["beta"].astype(jnp.float64)}, impl="gpu")
    assert gpu.passed_over_reason(**arguments) is not None
    delta_rule(**arguments)


def test_automatic():
    """Long enough calls with enough heads take the kernels on a GPU."""

    def taken(*shape):
        return gpu.passed_over_reason(v=jax.ShapeDtypeStruct((*shape, 4), jnp.bfloat16)) is None

    assert not taken(8, 128, 8)
    assert next(iter(DELTA_RULE)) == "gpu"
    with devices.as_on("gpu"):
        assert taken(8, 128, 8)
        assert taken(1, 2048, 8)
        assert not any((taken(8, 127, 8), taken(9, 128, 7), taken(1, 2047, 8), taken(1, 2048, 7)))


def test_probe_lowers():
    gpu._probe()


@pytest.mark.gpu
@by_case
@pytest.mark.parametrize("time", [1, 2, 37, 130, 1000])
@pytest.mark.parametrize("segments", [True, False])
def test_shared_cases_on_gpu(case, time, segments):
    poisoned(2**26)
    rng = np.random.default_rng()
    arguments = shared.cast(shared.draw(case, 2, time, seed=int(rng.integers(2**31))), "bfloat16")
    ids = {"segment_ids": ids_of(rng, 2, time)} if segments else {}
    # A gradient of one or two tokens may be one number that is left of terms that cancel. Without decay, XLA's gradient of
    # the initial state is 1.2e-2 off at some seeds.
    tolerance = 1.5 * TOLERANCE if time > 2 else 5 * TOLERANCE
    check(arguments, tolerance, **ids, **case.options)


SHAPES = {
    "128": {"batch": 2, "time": 1000, "groups": 3, "heads": 3, "key_dim": 128, "value_dim": 128},
    "64": {"batch": 3, "time": 517, "groups": 2, "heads": 4, "key_dim": 64, "value_dim": 64},
    "wide values": {"batch": 2, "time": 300, "groups": 1, "heads": 2, "key_dim": 64, "value_dim": 128},
    "wide keys": {"batch": 2, "time": 300, "groups": 1, "heads": 2, "key_dim": 96, "value_dim": 40},
    "Gated DeltaNet": {"batch": 2, "time": 700, "groups": 2, "heads": 2, "key_dim": 96, "value_dim": 192},
    "values of 256": {"batch": 2, "time": 300, "groups": 1, "heads": 2, "key_dim": 128, "value_dim": 256},
    "a long row in parts": {
        "batch": 1,
        "time": 4096,
        "groups": 2,
        "heads": 2,
        "key_dim": 96,
        "value_dim": 192,
    },
    "whole chunks": {"batch": 1, "time": 512, "groups": 2, "heads": 2, "key_dim": 128, "value_dim": 128},
    "many rows": {"batch": 150, "time": 65, "groups": 2, "heads": 2, "key_dim": 64, "value_dim": 64},
    "one long row": {"batch": 1, "time": 8192, "groups": 2, "heads": 2, "key_dim": 128, "value_dim": 128},
}


@pytest.mark.gpu
@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_on_gpu(shape, decay):
    """Fresh random inputs, with segments or without."""
    rng = np.random.default_rng()
    sizes = SHAPES[shape]
    arguments = arguments_of(rng, decay=decay, **sizes)
    with_segments = (list(SHAPES).index(shape) + decay) % 2
    options = {"segment_ids": ids_of(rng, sizes["batch"], sizes["time"], 0.01)} if with_segments else {}
    poisoned(2**27)
    check(arguments, scale=0.2, **options)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings",
    [
        SHORT,
        Settings(forward=1, states=1),
        Settings(states=4, workers=3),
        Settings(workers=2),
        Settings(keep=False, turns=3),
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_layouts_on_gpu(request, monkeypatch, settings, several):
    """Also with blocks that take several chunks, as they do where there are enough of them."""
    monkeypatch.setattr(gpu, "SETTINGS", settings)
    if several:
        request.getfixturevalue("in_turn")
    rng = np.random.default_rng()
    poisoned(2**26)
    check(arguments_of(rng, 2, 777, key_dim=128, value_dim=128), segment_ids=ids_of(rng, 2, 777))


@pytest.mark.gpu
@pytest.mark.parametrize("pieces", [None, 3, 30])
@pytest.mark.parametrize("decay, often", [(True, None), (False, None), (True, 0.001)])
def test_pieces_on_gpu(monkeypatch, pieces, decay, often):
    """A long row of few heads in pieces; without decay and segments, all of it reaches the end."""
    in_pieces(monkeypatch, pieces)
    rng = np.random.default_rng()
    arguments = arguments_of(rng, 1, 5000, groups=2, heads=4, key_dim=128, value_dim=128, decay=decay)
    poisoned(2**26)
    check(arguments, segment_ids=None if often is None else ids_of(rng, 1, 5000, often))


@pytest.mark.gpu
def test_transformations_on_gpu():
    arguments = arguments_of(np.random.default_rng(), 8, 150, groups=2)

    def run(arguments):
        return delta_rule(**arguments, impl="gpu")

    def loss(arguments):
        return sum(x.astype(jnp.float32).sum() for x in run(arguments))

    def merge(tree):
        return jax.tree.map(lambda x: x.reshape(8, *x.shape[2:]), tree)

    split = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), arguments)
    for name, function in (("outputs", run), ("gradients", jax.grad(loss))):
        want = jax.tree.map(np.asarray, function(arguments))
        for transform, got in {
            "jit": jax.jit(function)(arguments),
            "checkpoint": jax.checkpoint(function)(arguments),
            "vmap": merge(jax.vmap(function)(split)),
            "scan": merge(jax.lax.map(function, split)),
            "shard_map": over_one_device(function)(arguments),
        }.items():
            shared.close(got, want, 1e-3, f"{name} under {transform}")
