"""The Hopper kernels of `gated_linear_attention`: under the interpreter and through the compiler here, and on a GPU.

The interpreter fills memory with NaN beforehand, also the outputs. On a GPU, `poisoned` does.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from layers.kernels import devices, dispatch, mosaic_gpu
from layers.kernels.gated_linear_attention import IMPLEMENTATIONS, gated_linear_attention, gpu
from layers.kernels.gated_linear_attention.cases import SUITE
from layers.kernels.gated_linear_attention.gpu import grouped as gpu_grouped
from layers.kernels.gated_linear_attention.gpu import kernels as gpu_kernels
from layers.kernels.gated_linear_attention.gpu.kernels import Settings
from layers.kernels.segments import Segments
from tests.layers.kernels import test_primitives as shared
from tests.layers.kernels.test_linear_recurrence_gpu import over_one_device, poisoned

TOLERANCE = shared.TOLERANCE["bfloat16"]
CASES = [case for case in SUITE.cases if case.name in ("scalar", "no_decay", "fixed_decay")]
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels run in the interpreter, with a state kept for every chunk."""
    monkeypatch.setattr(gpu, "SPAN", 1)
    with mosaic_gpu.interpreted():
        yield


def arguments_of(rng, shape, heads, widths, *, strong=0.03):
    """Random arguments (b, t) with heads of q, k and v, and widths of keys and values; some decays are -20."""
    count = max(heads)
    (q, k, v), (keys, values) = heads, widths
    log_decay = -0.1 * rng.random((*shape, count))
    log_decay = np.where(rng.random(log_decay.shape) < strong, -20.0, log_decay)
    return {
        "q": jnp.asarray(rng.standard_normal((*shape, q, keys)), jnp.bfloat16),
        "k": jnp.asarray(rng.standard_normal((*shape, k, keys)), jnp.bfloat16),
        "v": jnp.asarray(rng.standard_normal((*shape, v, values)), jnp.bfloat16),
        "log_decay": jnp.asarray(log_decay, jnp.float32),
        "initial_state": jnp.asarray(rng.standard_normal((shape[0], count, keys, values)), jnp.float32),
    }


def ids_of(rng, shape, often=0.03):
    """Segments that start at random, with padding anywhere."""
    ids = np.cumsum(rng.random(shape) < often, axis=1) * (rng.random(shape) < 0.9)
    return jnp.asarray(ids, jnp.int32)


def check(arguments, case=CASES[0], tolerance=TOLERANCE, **options):
    """Compares outputs and all gradients with the float64 reference; `options` go to the call."""
    got, want, _ = shared.beside_reference(SUITE, case, "gpu", arguments, **options)
    shared.close(got[0], want[0], TOLERANCE, "outputs")
    for key in want[1]:
        shared.close(got[1][key], want[1][key], tolerance, f"gradient of {key}")
        assert got[1][key].dtype == arguments[key].dtype
    assert got[0][1].dtype == jnp.float32


@pytest.mark.slow
@by_case
def test_interpreted(interpreted, case):
    """Odd lengths and widths, shared heads, and every decay that the kernels take."""
    check(shared.cast(shared.draw(case, 1, 67), "bfloat16"), case)


@pytest.mark.slow
@pytest.mark.parametrize("widths", [(128, 64), (64, 128)])
def test_interpreted_in_pieces_with_segments(interpreted, monkeypatch, widths):
    for name in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(gpu, name, Settings(pieces=2))
    rng = np.random.default_rng(1)
    check(arguments_of(rng, (1, 150), (1, 1, 1), widths), segment_ids=ids_of(rng, (1, 150)))


def normalized_arguments_of(rng, shape, heads, widths, *, alike=0.0, **options):
    """Arguments with positive features of queries and keys, and values with the mean `alike`."""
    arguments = arguments_of(rng, shape, heads, widths, **options)
    state = rng.standard_normal((*arguments["initial_state"].shape[:3], widths[1])) + alike
    sums = rng.uniform(1, 2, (*state.shape[:3], 1))
    positive = {n: jnp.exp(0.5 * arguments[n].astype(jnp.float32)).astype(jnp.bfloat16) for n in "qk"}
    v = (arguments["v"].astype(jnp.float32) + alike).astype(jnp.bfloat16)
    return (
        arguments
        | positive
        | {"v": v, "initial_state": jnp.asarray(np.append(state, sums, axis=-1), jnp.float32)}
    )


# The gradients of queries are what is left of terms that cancel: whatever their length, outputs are the same.
NORMALIZED = {
    "case": dataclasses.replace(CASES[0], options={"normalize": True}),
    "tolerance": 1.5 * TOLERANCE,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "heads, widths", [((1, 1, 1), (144, 160)), ((1, 2, 1), (40, 130)), ((1, 1, 1), (200, 24))], ids=str
)
def test_interpreted_heads_in_parts(interpreted, heads, widths):
    """Wide values, also shared ones, and wide keys; in two chunks, with segments and an initial state."""
    rng = np.random.default_rng(7)
    check(arguments_of(rng, (1, 70), heads, widths), segment_ids=ids_of(rng, (1, 70)))


@pytest.mark.slow
@pytest.mark.parametrize("alike", [0.0, 3.0])
def test_interpreted_normalized(interpreted, alike):
    """Also where all values have a large mean, which the gradients of queries do not depend on."""
    rng = np.random.default_rng(8)
    arguments = normalized_arguments_of(rng, (1, 70), (1, 2, 2), (40, 24), alike=alike)
    check(arguments, segment_ids=ids_of(rng, (1, 70)), **NORMALIZED)


@pytest.mark.slow
def test_interpreted_bonus(interpreted):
    rng = np.random.default_rng(9)
    arguments = arguments_of(rng, (1, 70), (1, 2, 2), (40, 24))
    arguments["bonus"] = jnp.asarray(rng.standard_normal((2, 40)), jnp.float32)
    check(arguments, segment_ids=ids_of(rng, (1, 70)))


@pytest.mark.slow
def test_interpreted_under_transformations(interpreted):
    arguments = arguments_of(np.random.default_rng(2), (2, 5), (1, 1, 1), (6, 5))
    want = jax.tree.map(np.asarray, gated_linear_attention(**arguments, impl="xla"))

    def run(arguments):
        return gated_linear_attention(**arguments, impl="gpu")

    rows = jax.tree.map(lambda v: v[:, None], arguments)
    mapped = jax.jit(jax.vmap(run))(rows)
    shared.close(jax.tree.map(lambda v: v[:, 0], mapped), want, TOLERANCE, "vmap")
    shared.close(over_one_device(run)(arguments), want, TOLERANCE, "shard_map")


@pytest.mark.slow
@pytest.mark.parametrize("heads, width", [((1, 1, 1), 128), ((1, 1, 2), 64)], ids=str)
@pytest.mark.parametrize("fenced", [True, False])
def test_races(monkeypatch, capsys, fenced, heads, width):
    """Buffers are used again only after all lanes and copies are done with them; without fences that shows."""
    if not fenced:
        monkeypatch.setattr(mosaic_gpu.plgpu, "commit_smem", lambda: None)
    monkeypatch.setattr(gpu, "SPAN", 1)
    monkeypatch.setattr(gpu_grouped, "FEWEST", 2)
    arguments = arguments_of(np.random.default_rng(3), (1, 190), heads, (128, width))

    def loss(arguments):
        o, final = gpu.gated_linear_attention(
            *(arguments[name] for name in ("q", "k", "v", "log_decay")),
            *(None, 1.0, False, arguments["initial_state"], None, 0),
        )
        return o.astype(jnp.float32).sum() + final.sum()

    with mosaic_gpu.interpreted(detect_races=True):
        jax.block_until_ready(jax.jit(jax.grad(loss))(arguments))
    assert ("RACE DETECTED" in capsys.readouterr().out) != fenced


def lowered(heads, widths, settings, *, segments):
    """Both passes as the compiler's front end takes them."""
    shape = 2, 1111
    arguments = jax.eval_shape(lambda: arguments_of(np.random.default_rng(0), shape, heads, widths))
    ids = jnp.ones(shape, jnp.int32) if segments else None

    def run(arguments):
        return gpu.gated_linear_attention(
            *(arguments[name] for name in ("q", "k", "v", "log_decay")),
            *(None, 1.0, False, arguments["initial_state"], Segments.of(ids), 0),
            forward=settings,
            backward=settings,
        )

    def both(arguments):
        output, pullback = jax.vjp(run, arguments)
        return output, pullback(output)

    return jax.jit(both).trace(arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "heads, widths, pieces",
    [
        ((2, 2, 2), (128, 128), 2),
        ((1, 1, 4), (128, 64), 1),
        ((1, 1, 8), (128, 64), 2),
        ((2, 2, 16), (64, 64), 1),
        ((4, 2, 1), (64, 128), 1),
        ((1, 1, 1), (40, 24), 2),
    ],
    ids=str,
)
def test_lowers_for_a_gpu(heads, widths, pieces):
    text = lowered(heads, widths, Settings(pieces=pieces), segments=widths[0] == widths[1])
    assert text.count("@mosaic_gpu_v2") == (3 if pieces == 1 else 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "widths, normalize, bonus, kernels",
    [((192, 192), False, False, 6), ((64, 128), True, False, 3), ((64, 64), False, True, 3)],
)
def test_heads_in_parts_lower_for_a_gpu(widths, normalize, bonus, kernels):
    """Three kernels for each part of the keys."""
    arguments = jax.eval_shape(lambda: arguments_of(np.random.default_rng(0), (2, 1111), (2, 2, 2), widths))
    given = [arguments[name] for name in ("q", "k", "v", "log_decay")]

    def loss(q, k, v, g, u):
        o, final = gpu.gated_linear_attention(
            *(q, k, v, g, u if bonus else None, 1.0, normalize, None, None, 1e-6),
            forward=Settings(pieces=1),
            backward=Settings(pieces=1),
        )
        return o.astype(jnp.float32).sum() + final.sum()

    u = jax.ShapeDtypeStruct((2, widths[0]), jnp.float32)
    traced = jax.jit(jax.grad(loss, (0, 1, 2, 3, 4))).trace(*given, u)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2") == kernels


@pytest.mark.slow
@pytest.mark.parametrize(
    "heads, split", [((8, 8, 8), "model"), ((1, 1, 8), "model"), ((2, 2, 8), None)], ids=str
)
def test_explicit_mesh(heads, split):
    """Rows are shared out as those of v are, heads too where the others have as many or one; time is not."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), (jax.sharding.AxisType.Explicit,) * 2)

    def array(shape, spec, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

    def loss(q, k, v, g, ids):
        o, final = gpu.gated_linear_attention(q, k, v, g, None, 1.0, False, None, Segments.of(ids), 0)
        return o.astype(jnp.float32).sum() + final.sum()

    def spec(count):
        return P("data", None, "model" if count == 8 else None, None)

    inputs = [array((8, 24, count, 64), spec(count)) for count in heads]
    with jax.set_mesh(mesh):
        traced = jax.jit(jax.grad(loss, (0, 1, 2, 3))).trace(
            *inputs, array((8,), P(), jnp.float32), array((8, 24), P("data"), jnp.int32)
        )
        result = traced.lower(lowering_platforms=("cuda",))
        here = 8 if split is None else 4
        assert f"tensor<2x24x{here}x64xbf16>" in result.as_text()
        assert [v.sharding.spec for v in result.out_info] == [*map(spec, heads), P(None)]
        late = jnp.zeros((2, 16, 1, 8), jnp.bfloat16, out_sharding=P(None, "data"))
        assert "expected whole rows" in gpu.unsupported_reason(late, late, late, None, None, False, None)


def test_refusals(monkeypatch, caplog):
    """What is not implemented, or would lose accuracy, says so; where nothing can run, XLA computes."""
    arguments = arguments_of(np.random.default_rng(4), (1, 5), (2, 2, 2), (4, 4))
    channels = -jnp.ones((1, 5, 2, 4))
    plain = {key: arguments[key] for key in ("q", "k", "v")}
    wide = {key: x.astype(jnp.float32) for key, x in plain.items()}
    long = dict.fromkeys(("q", "k"), jnp.zeros((1, 5, 2, 520), jnp.bfloat16))
    for given, reason in (
        (
            plain | {"log_decay": channels, "normalize": True},
            "normalize=True with a decay per key channel is not implemented",
        ),
        (wide, "q has dtype float32, which matrix units would round"),
        (plain | long, "k has heads of 520; expected at most 512"),
        (arguments, "needs a Hopper GPU; JAX computes on cpu"),
    ):
        with pytest.raises(ValueError, match=f"impl='gpu' .* {reason}"):
            gated_linear_attention(**given, impl="gpu")

    def probe():
        raise NotImplementedError("a new interface\nmore")

    monkeypatch.setattr(gpu, "_probe", probe)
    chosen = dataclasses.replace(IMPLEMENTATIONS["gpu"], passed_over_reason=lambda **_: None)
    monkeypatch.setitem(IMPLEMENTATIONS, "gpu", chosen)
    dispatch.log_once.cache_clear()  # another test may have logged the same reason
    with caplog.at_level("INFO", logger="layers"), devices.as_on("gpu"):
        gated_linear_attention(**arguments)
    assert "NotImplementedError: a new interface" in caplog.text


def test_automatic(monkeypatch):
    """Calls that fill chunks, matrices and the machine take the kernels on a GPU."""

    def taken(batch=8, time=64, heads=(1, 8), width=32):
        q, v = (jax.ShapeDtypeStruct((batch, time, count, width), jnp.bfloat16) for count in heads)
        return gpu.passed_over_reason(q=q, k=q, v=v) is None

    assert not taken()
    with devices.as_on("gpu"):
        assert taken()
        assert taken(heads=(8, 1))
        assert taken(batch=1, time=2048)
        assert not any((taken(batch=1, time=2047), taken(batch=1, time=2048, heads=(1, 7))))
        assert not any((taken(batch=7), taken(time=63), taken(width=31), taken(heads=(1, 7))))
        monkeypatch.setattr(devices, "count", lambda: 2)
        assert not taken()


def test_probe_lowers():
    gpu._probe()


def test_time_is_cut_only_where_blocks_are_few():
    assert gpu.piece_length(64, 128, 8, Settings()) == 64
    assert gpu.piece_length(512, 8, 8, Settings()) == 32
    assert gpu.piece_length(3, 1, 8, Settings()) == 3
    assert gpu_kernels.warpgroups(1, 1, parts=2) == gpu_kernels.warpgroups(64, 64, parts=1) == 2
    assert gpu_kernels.warpgroups(1, 64, parts=1) == 1


def exact(case, time, *, segments=False):
    """A shared case in bfloat16, against its float64 reference."""
    arguments = shared.cast(shared.draw(case, 2, time), "bfloat16")
    ids = ids_of(np.random.default_rng(time), (2, time), 0.05) if segments else None
    check(arguments, case, **({} if ids is None else {"segment_ids": ids}))


@pytest.mark.gpu
@by_case
@pytest.mark.parametrize("time", [1, 2, 37, 130, 1200])
def test_shared_cases(case, time):
    poisoned(2**26)
    exact(case, time)
    exact(case, time, segments=True)


@pytest.mark.gpu
@by_case
def test_cut_anywhere(case):
    """The final state of one call is the initial state of the next."""
    arguments = shared.cast(shared.draw(case, 2, 200), "bfloat16")
    whole, final = shared.call(SUITE, case, "gpu", arguments)
    for cut in (0, 1, 64, 77, 200):
        outputs, state = [], arguments["initial_state"]
        for piece in (slice(None, cut), slice(cut, None)):
            part = {
                name: x[:, piece] if name in SUITE.time_arguments and x.ndim > 1 else x
                for name, x in arguments.items()
            }
            output, state = shared.call(SUITE, case, "gpu", part | {"initial_state": state})
            outputs.append(output)
        joined = jnp.concatenate(outputs, axis=1).astype(jnp.float32)
        shared.close(joined, np.asarray(whole, np.float32), TOLERANCE, f"cut at {cut}")
        shared.close(state, np.asarray(final), TOLERANCE, f"state, cut at {cut}")


SHAPES = {
    "one head size": ((3, 1000), (4, 4, 4), (128, 128)),
    "Mamba-2": ((2, 777), (1, 1, 8), (128, 64)),
    "two groups": ((2, 640), (2, 2, 6), (64, 64)),
    "shared values": ((2, 300), (4, 2, 1), (64, 128)),
    "odd widths": ((2, 129), (3, 3, 3), (96, 40)),
    "RetNet at 768": ((2, 700), (4, 4, 4), (192, 384)),
    "RetNet's heads of 256 x 512": ((1, 300), (2, 2, 2), (256, 512)),
    "GLA": ((2, 500), (4, 4, 4), (96, 192)),
    "Lightning Attention at 2048": ((2, 300), (8, 8, 8), (256, 256)),
    "one row, in pieces": ((1, 8200), (2, 2, 2), (128, 128)),
    "many rows": ((140, 70), (1, 1, 1), (64, 64)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("segments", [False, True], ids=["whole", "segments"])
@pytest.mark.parametrize("shape", SHAPES)
def test_on_gpu(shape, segments):
    """Fresh random inputs over memory that was filled with NaN."""
    rng = np.random.default_rng()
    (batch, time), heads, widths = SHAPES[shape]
    arguments = arguments_of(rng, (batch, time), heads, widths, strong=0.03 if segments else 0.0)
    poisoned(2**26)
    options = {"segment_ids": ids_of(rng, (batch, time), 0.01)} if segments else {}
    check(arguments, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("segments", [False, True], ids=["whole", "segments"])
@pytest.mark.parametrize("alike", [0.0, 3.0])
@pytest.mark.parametrize("widths", [(96, 96), (256, 96), (64, 128)], ids=str)
def test_normalized_on_gpu(widths, alike, segments):
    """Linear attention's and Performer's heads."""
    rng = np.random.default_rng()
    arguments = normalized_arguments_of(rng, (2, 900), (3, 3, 3), widths, alike=alike)
    poisoned(2**26)
    options = {"segment_ids": ids_of(rng, (2, 900), 0.01)} if segments else {}
    check(arguments, **options, **NORMALIZED)


@pytest.mark.gpu
@pytest.mark.parametrize("segments", [False, True], ids=["whole", "segments"])
def test_bonus_on_gpu(segments):
    rng = np.random.default_rng()
    arguments = arguments_of(rng, (2, 900), (2, 4, 4), (64, 96))
    arguments["bonus"] = jnp.asarray(rng.standard_normal((4, 64)), jnp.float32)
    poisoned(2**26)
    check(arguments, **({"segment_ids": ids_of(rng, (2, 900), 0.01)} if segments else {}))


@pytest.mark.gpu
@pytest.mark.parametrize("stages, pieces", [(1, 1), (2, 3), (2, None)])
@pytest.mark.parametrize("span", [1, 8])
def test_layouts_on_gpu(monkeypatch, span, stages, pieces):
    monkeypatch.setattr(gpu, "SPAN", span)
    for name in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(gpu, name, Settings(stages=stages, pieces=pieces))
    rng = np.random.default_rng()
    check(arguments_of(rng, (2, 2100), (2, 2, 2), (128, 128)), segment_ids=ids_of(rng, (2, 2100), 0.002))


@pytest.mark.gpu
@pytest.mark.parametrize("shared, width", [(16, 128), (1, 64)])
def test_repeats_exactly_on_gpu(shared, width):
    """Two hundred calls give the same numbers: no kernel depends on the order in which warpgroups and copies run."""
    rng = np.random.default_rng()
    arguments = arguments_of(rng, (8, 1024), (shared, shared, 16), (128, width))

    @jax.jit
    def run(arguments):
        def loss(arguments):
            o, final = gated_linear_attention(**arguments, impl="gpu")
            return o.astype(jnp.float32).sum() + final.sum(), (o, final)

        return jax.value_and_grad(loss, has_aux=True)(arguments)

    first = run(arguments)
    for _ in range(200):
        again = run(arguments)
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), first, again)))


@pytest.mark.gpu
def test_transformations_on_gpu():
    arguments = arguments_of(np.random.default_rng(), (8, 90), (2, 2, 2), (64, 64))
    want = jax.tree.map(np.asarray, gated_linear_attention(**arguments, impl="xla"))

    def run(arguments):
        return gated_linear_attention(**arguments, impl="gpu")

    def loss(arguments):
        return sum(leaf.astype(jnp.float32).sum() for leaf in run(arguments))

    def merge(tree):
        return jax.tree.map(lambda v: v.reshape(8, *v.shape[2:]), tree)

    split = jax.tree.map(lambda v: v.reshape(2, 4, *v.shape[1:]), arguments)
    shared.close(jax.jit(run)(arguments), want, TOLERANCE, "jit")
    shared.close(merge(jax.vmap(run)(split)), want, TOLERANCE, "vmap")
    shared.close(merge(jax.lax.map(run, split)), want, TOLERANCE, "scan")
    shared.close(over_one_device(run)(arguments), want, TOLERANCE, "shard_map")
    plain = jax.tree.map(np.asarray, jax.grad(loss)(arguments))
    for name, transformed in {
        "checkpoint": jax.grad(jax.checkpoint(loss))(arguments),
        "vmap": merge(jax.vmap(jax.grad(loss))(split)),
        "shard_map": over_one_device(jax.grad(loss))(arguments),
    }.items():
        shared.close(transformed, plain, 1e-6, f"gradients under {name}")
