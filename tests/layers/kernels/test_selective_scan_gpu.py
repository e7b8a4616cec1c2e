"""The Triton kernels of `selective_scan`: interpreted, lowered, and on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from layers.kernels import devices, pallas_triton
from layers.kernels.selective_scan import gpu, selective_scan
from layers.kernels.selective_scan.cases import SUITE
from tests.layers.kernels import test_primitives as shared
from tests.layers.kernels.test_gated_linear_attention_gpu import ids_of
from tests.layers.kernels.test_linear_recurrence_gpu import over_one_device, poisoned

CASES = {case.name: case for case in SUITE.cases if case.name != "grouped"}
TOLERANCES = {"float32": 5e-6, "bfloat16": shared.TOLERANCE["bfloat16"]}


def check(case, arguments, dtype, ids=None):
    """Compares results and all gradients with the float64 reference."""
    options = {} if ids is None else {"segment_ids": ids}
    got, want, _ = shared.beside_reference(SUITE, case, "gpu", shared.cast(arguments, dtype), **options)
    shared.close(got, want, TOLERANCES[dtype], "results and gradients")


def arguments_of(rng, batch, time, channels, states, groups=1):
    """Random arguments with all options, in the ranges of Mamba."""
    return {
        "x": rng.standard_normal((batch, time, channels)),
        "dt": rng.standard_normal((batch, time, channels)) - 3.0,
        "a": -np.exp(rng.standard_normal((channels, states))),
        "b": rng.standard_normal((batch, time, groups, states)),
        "c": rng.standard_normal((batch, time, groups, states)),
        "skip": rng.standard_normal(channels),
        "gate": rng.standard_normal((batch, time, channels)),
        "dt_bias": rng.standard_normal(channels),
        "initial_state": rng.standard_normal((batch, channels, states)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("segments", [False, True], ids=["whole", "segments"])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", CASES)
def test_interpreted(name, dtype, segments):
    """21 steps end within a span; the last one may begin a segment."""
    ids = ids_of(np.random.default_rng(0), (2, 21), 0.1) if segments else None
    with pallas_triton.interpreted():
        check(CASES[name], shared.draw(CASES[name], 2, 21), dtype, ids)


@pytest.mark.slow
def test_interpreted_groups():
    """Programs read the vectors of their own group, and the gradients of a group are sums over its programs."""
    with pallas_triton.interpreted():
        check(CASES["mamba"], arguments_of(np.random.default_rng(1), 1, 9, 128, 4, groups=2), "float32")


@pytest.mark.slow
def test_interpreted_small_steps():
    """Steps of a millionth keep their digits through softplus, whose sum 1 + exp would round them away."""
    arguments = arguments_of(np.random.default_rng(3), 1, 9, 32, 2)
    small = {"dt": np.full((1, 9, 32), -14.0), "initial_state": np.zeros((1, 32, 2)), "skip": np.zeros(32)}
    with pallas_triton.interpreted():
        check(CASES["mamba"], arguments | small, "float32")


@pytest.mark.slow
def test_lowers_for_a_gpu_by_shards():
    """Rows and channels are shared out as those of x are."""
    mesh = pallas_triton.hopper_mesh(data=4, model=2)
    spec = P("data", None, "model")
    x = jax.ShapeDtypeStruct((8, 24, 128), jnp.bfloat16, sharding=jax.NamedSharding(mesh, spec))

    def loss(x, dt):
        a, b = -jnp.ones((128, 16)), jnp.ones((8, 24, 1, 16))
        y, final = gpu.selective_scan(x, dt, a, b, b, None, None, None, True, None, None)
        return y.sum() + final.sum()

    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(loss, (0, 1))).trace(x, x)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert "tensor<2x24x64xbf16>" in text
        assert [aval.sharding.spec for aval in traced.jaxpr.out_avals] == [spec] * 2


def test_refusals():
    arguments = {
        key: jnp.asarray(value, jnp.float32)
        for key, value in arguments_of(np.random.default_rng(2), 1, 3, 4, 40).items()
    }
    narrow = arguments_of(np.random.default_rng(2), 1, 3, 8, 4, groups=2)
    many = arguments_of(np.random.default_rng(2), 2**16, 1, 1, 1)
    for given, reason in (
        (many, "x has 65536 rows; expected at most 65535"),
        (arguments, "a has 40 states per channel; expected at most 32"),
        (narrow, "b has 2 groups of 4 channels; expected multiples of 32"),
        (
            {key: x[..., :4] if key in "abc" else x for key, x in arguments.items()}
            | {"initial_state": None},
            "needs a Hopper GPU",
        ),
    ):
        given = {key: x if x is None else jnp.asarray(x, jnp.float32) for key, x in given.items()}
        with pytest.raises(ValueError, match=f"impl='gpu' .* {reason}"):
            selective_scan(**given, dt_softplus=True, impl="gpu")


def test_short_calls_and_few_channels_are_left_to_xla():
    with devices.as_on("gpu"):
        for shape, reason in (
            ((8, 256, 1024), None),
            ((8, 255, 1024), "x has 255 tokens; the kernels are timed from 256 on"),
            ((7, 256, 1024), "batch x channels is 7168; from 8192 on they fill the GPU"),
        ):
            x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
            assert gpu.passed_over_reason(x=x) == reason


@pytest.mark.gpu
@pytest.mark.parametrize("segments", [False, True], ids=["whole", "segments"])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("time", [1, 300])
def test_shared_case(name, dtype, segments, time):
    poisoned(2**26)
    ids = ids_of(np.random.default_rng(time), (2, time), 0.1) if segments else None
    check(CASES[name], shared.draw(CASES[name], 2, time), dtype, ids)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(2, 700, 96, 16), (1, 130, 40, 5), (3, 64, 256, 32)], ids=str)
def test_on_gpu(sizes):
    """Fresh random inputs over memory that was filled with NaN."""
    rng = np.random.default_rng()
    poisoned(2**26)
    check(CASES["mamba"], arguments_of(rng, *sizes), "bfloat16", ids_of(rng, sizes[:2], 0.01))


@pytest.mark.gpu
def test_transformations_on_gpu():
    rng = np.random.default_rng()
    arguments = {k: jnp.asarray(v, jnp.float32) for k, v in arguments_of(rng, 8, 90, 64, 16).items()}
    series = {k: arguments.pop(k) for k in ("x", "dt", "b", "c", "gate", "initial_state")}
    want = jax.tree.map(np.asarray, selective_scan(**series, **arguments, dt_softplus=True, impl="xla"))

    def run(series):
        return selective_scan(**series, **arguments, dt_softplus=True, impl="gpu")

    def merge(tree):
        return jax.tree.map(lambda v: v.reshape(8, *v.shape[2:]), tree)

    split = jax.tree.map(lambda v: v.reshape(2, 4, *v.shape[1:]), series)
    for got, name in ((jax.jit(run)(series), "jit"), (over_one_device(run)(series), "shard_map")):
        shared.close(got, want, 5e-6, name)
    for got, name in ((jax.vmap(run)(split), "vmap"), (jax.lax.map(run, split), "scan")):
        shared.close(merge(got), want, 5e-6, name)
