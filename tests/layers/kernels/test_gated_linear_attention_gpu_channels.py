"""The Triton kernels of `gated_linear_attention` with a decay per key channel: interpreted, lowered, and on a GPU.

The interpreter fills memory with NaN beforehand, also the outputs. On a GPU, `poisoned` does.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from layers.kernels import pallas_triton
from layers.kernels.gated_linear_attention import gated_linear_attention, gpu
from layers.kernels.gated_linear_attention.cases import SUITE
from layers.kernels.gated_linear_attention.gpu import channel_tiles, channels
from layers.kernels.segments import Segments
from tests.layers.kernels import test_primitives as shared
from tests.layers.kernels.test_gated_linear_attention_gpu import arguments_of as scalar_arguments
from tests.layers.kernels.test_gated_linear_attention_gpu import ids_of
from tests.layers.kernels.test_linear_recurrence_gpu import over_one_device, poisoned

TOLERANCE = shared.TOLERANCE["bfloat16"]
CASES = {case.name: case for case in SUITE.cases}
CASE = CASES["channel"]


def arguments_of(rng, shape, heads, widths, *, strong=0.03):
    """Random arguments (b, t) with heads of q, k and v, and widths of keys and values; some decays are -20."""
    shapes = (*shape, max(heads), widths[0])
    log_decay = np.where(rng.random(shapes) < strong, -20.0, -0.1 * rng.random(shapes))
    return scalar_arguments(rng, shape, heads, widths) | {"log_decay": jnp.asarray(log_decay, jnp.float32)}


def check(arguments, **options):
    """Compares outputs and all gradients with the float64 reference; `options` go to the call."""
    got, want, _ = shared.beside_reference(SUITE, CASE, "gpu", arguments, **options)
    shared.close(got[0], want[0], TOLERANCE, "outputs")
    for key in want[1]:
        shared.close(got[1][key], want[1][key], TOLERANCE, f"gradient of {key}")
        assert got[1][key].dtype == arguments[key].dtype
    assert got[0][1].dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize(
    "heads, widths, time",
    [((1, 1, 1), (64, 64), 77), ((1, 1, 1), (128, 40), 130), ((1, 2, 1), (6, 130), 5)],
    ids=str,
)
def test_interpreted(heads, widths, time):
    """Odd lengths and widths, and shared heads."""
    with pallas_triton.interpreted():
        check(arguments_of(np.random.default_rng(0), (1, time), heads, widths))


@pytest.mark.slow
def test_interpreted_with_segments():
    rng = np.random.default_rng(1)
    with pallas_triton.interpreted():
        check(arguments_of(rng, (1, 130), (1, 1, 1), (64, 64)), segment_ids=ids_of(rng, (1, 130)))


@pytest.mark.slow
@pytest.mark.parametrize("segments", [False, True], ids=["whole", "segments"])
def test_interpreted_with_a_bonus(segments):
    case = CASES["channel_bonus"]
    ids = {"segment_ids": ids_of(np.random.default_rng(1), (2, 130))} if segments else {}
    arguments = shared.cast(shared.draw(case, 2, 130), "bfloat16")
    with pallas_triton.interpreted():
        got, want, _ = shared.beside_reference(SUITE, case, "gpu", arguments, **ids)
    shared.close(got, want, TOLERANCE, "outputs and gradients")


@pytest.mark.slow
def test_interpreted_at_the_limits_of_decay():
    """Decays down to -inf, that is a reset of the channel, leave finite numbers, as in XLA."""
    arguments = arguments_of(np.random.default_rng(2), (1, 70), (1, 1, 1), (64, 64), strong=0.3)
    log_decay = arguments["log_decay"]
    arguments["log_decay"] = jnp.where(log_decay == -20.0, -jnp.inf, log_decay)
    want = gated_linear_attention(**arguments, impl="xla")

    def loss(arguments):
        o, final = gated_linear_attention(**arguments, impl="gpu")
        return o.astype(jnp.float32).sum() + final.sum(), (o, final)

    with pallas_triton.interpreted():
        gradients, got = jax.jit(jax.grad(loss, has_aux=True))(arguments)
    shared.close(got, want, TOLERANCE, "outputs")
    assert all(bool(jnp.isfinite(x.astype(jnp.float32)).all()) for x in jax.tree.leaves(gradients))


@pytest.mark.slow
@pytest.mark.parametrize(
    "heads, widths, segments",
    [((2, 2, 2), (128, 128), True), ((1, 2, 4), (96, 192), False), ((16, 16, 16), (64, 256), True)],
    ids=str,
)
def test_lowers_for_a_gpu(heads, widths, segments):
    shape = 9, 1111
    arguments = jax.eval_shape(lambda: arguments_of(np.random.default_rng(0), shape, heads, widths))
    ids = jnp.ones(shape, jnp.int32) if segments else None

    def both(arguments):
        def run(arguments):
            return gpu.gated_linear_attention(
                *(arguments[name] for name in ("q", "k", "v", "log_decay")),
                *(None, 1.0, False, arguments["initial_state"], Segments.of(ids), 0),
            )

        output, pullback = jax.vjp(run, arguments)
        return output, pullback(output)

    with jax.sharding.use_abstract_mesh(pallas_triton.hopper_mesh()):
        text = jax.jit(both).trace(arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__gpu$xla.gpu.triton") == 8


@pytest.mark.slow
def test_probe_lowers():
    channels.probe()


@pytest.mark.slow
def test_explicit_mesh():
    """Rows and heads are shared out as those of v are."""
    mesh = pallas_triton.hopper_mesh(data=4, model=2)
    spec = P("data", None, "model", None)

    def array(dtype):
        sharding = jax.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct((8, 24, 8, 64), dtype, sharding=sharding)

    def loss(q, k, v, g):
        o, final = gpu.gated_linear_attention(q, k, v, g, None, 1.0, False, None, None, 0)
        return o.astype(jnp.float32).sum() + final.sum()

    inputs = [array(jnp.bfloat16)] * 3 + [array(jnp.float32)]
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(loss, (0, 1, 2, 3))).trace(*inputs)
        result = traced.lower(lowering_platforms=("cuda",))
        assert "tensor<2x24x4x64xbf16>" in result.as_text()
        assert [aval.sharding.spec for aval in traced.jaxpr.out_avals] == [spec] * 4


def test_segments_in_chunks():
    """States that enter and leave chunks belong to the segments that pass their borders, through padding too."""
    number = jnp.asarray([[1] * 60 + [2] * 70 + [0] * 14, [0] * 130 + [1] * 14], jnp.int32)
    numbers = channel_tiles.numbers(number)
    assert numbers.entering.tolist() == [[1, 2, 2], [1, 1, 1]]
    assert numbers.leaving.tolist() == [[2, 2, 2], [1, 1, 1]]


@pytest.mark.parametrize("level", range(channel_tiles.LEVELS))
def test_levels(level):
    """Every pair of different steps is split at one level, the later step in the second block."""
    i, j = np.indices((channel_tiles.CHUNK,) * 2)
    pairs = np.asarray(channel_tiles.pairs(level))
    assert (pairs == (np.floor(np.log2(np.maximum(i ^ j, 0.5))) == level)).all()
    later = np.broadcast_to(np.asarray(channel_tiles.second(level)), pairs.shape)
    assert (later[pairs] == (i > j)[pairs]).all()


def test_refusals():
    arguments = arguments_of(np.random.default_rng(4), (1, 5), (2, 2, 2), (4, 4))
    wide = arguments | {"v": jnp.zeros((1, 5, 2, 520), jnp.bfloat16), "initial_state": None}
    many = arguments_of(np.random.default_rng(4), (2**15, 1), (2, 2, 2), (4, 4)) | {"initial_state": None}
    for given, reason in (
        (many, "q has 65536 rows times heads; expected at most 65535"),
        (wide, "v has heads of 520; expected at most 512"),
        (arguments, "needs a Hopper GPU; JAX computes on cpu"),
    ):
        with pytest.raises(ValueError, match=f"impl='gpu' .* {reason}"):
            gated_linear_attention(**given, impl="gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("time", [1, 2, 37, 130, 1200])
@pytest.mark.parametrize("segments", [False, True], ids=["whole", "segments"])
@pytest.mark.parametrize("name", ["channel", "channel_bonus"])
def test_shared_case(name, time, segments):
    poisoned(2**26)
    arguments = shared.cast(shared.draw(CASES[name], 2, time), "bfloat16")
    ids = {"segment_ids": ids_of(np.random.default_rng(time), (2, time), 0.05)} if segments else {}
    got, want, _ = shared.beside_reference(SUITE, CASES[name], "gpu", arguments, **ids)
    shared.close(got, want, TOLERANCE, "outputs and gradients")


SHAPES = {
    "one head size": ((3, 1000), (4, 4, 4), (128, 128)),
    "shared queries": ((2, 777), (1, 1, 8), (128, 64)),
    "shared values": ((2, 300), (4, 2, 1), (64, 128)),
    "wide values": ((2, 400), (2, 2, 2), (96, 192)),
    "widest values": ((9, 129), (8, 8, 8), (64, 256)),
    "odd widths": ((2, 129), (3, 3, 3), (96, 40)),
    "GLA at a width of 2048": ((2, 200), (2, 2, 2), (256, 512)),
    "narrow heads": ((4, 2100), (16, 16, 16), (64, 64)),
    "one row": ((1, 8200), (2, 2, 2), (128, 128)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("segments", [False, True], ids=["whole", "segments"])
@pytest.mark.parametrize("shape", SHAPES)
def test_on_gpu(shape, segments):
    """Fresh random inputs over memory that was filled with NaN."""
    rng = np.random.default_rng()
    (batch, time), heads, widths = SHAPES[shape]
    poisoned(2**26)
    options = {"segment_ids": ids_of(rng, (batch, time), 0.01)} if segments else {}
    check(arguments_of(rng, (batch, time), heads, widths), **options)


@pytest.mark.gpu
def test_repeats_exactly_on_gpu():
    """Two hundred calls give the same numbers: no kernel depends on the order in which programs run."""
    rng = np.random.default_rng()
    arguments = arguments_of(rng, (8, 1024), (16, 16, 16), (128, 128))

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

    def merge(tree):
        return jax.tree.map(lambda v: v.reshape(8, *v.shape[2:]), tree)

    split = jax.tree.map(lambda v: v.reshape(2, 4, *v.shape[1:]), arguments)
    shared.close(jax.jit(run)(arguments), want, TOLERANCE, "jit")
    shared.close(merge(jax.vmap(run)(split)), want, TOLERANCE, "vmap")
    shared.close(merge(jax.lax.map(run, split)), want, TOLERANCE, "scan")
    shared.close(over_one_device(run)(arguments), want, TOLERANCE, "shard_map")
