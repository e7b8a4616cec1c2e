"""The Triton kernels of `long_conv`: interpreted, lowered, and on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from layers.kernels import devices, pallas_triton
from layers.kernels.long_conv import gpu, long_conv
from layers.kernels.long_conv.cases import SUITE
from layers.kernels.long_conv.gpu import kernels, transforms
from tests.layers.kernels import test_primitives as shared
from tests.layers.kernels.test_linear_recurrence_gpu import over_one_device, poisoned

CASES = {case.name: case for case in SUITE.cases}
TOLERANCE = shared.TOLERANCE["bfloat16"]


def small_blocks(monkeypatch):
    """Sets blocks of 64 tokens, and of 128 in the backward pass."""
    monkeypatch.setattr(transforms, "FORWARD", ((16, 8, 1),))
    monkeypatch.setattr(transforms, "BACKWARD", ((16, 16, 1),))
    monkeypatch.setattr(kernels, "FREQUENCIES", 128)


def check(arguments):
    """Compares results and all gradients with the float64 reference."""
    arguments = shared.cast(arguments, "bfloat16") | {"kernel": jnp.asarray(arguments["kernel"], jnp.float32)}
    got, want, _ = shared.beside_reference(SUITE, CASES["as_long"], "gpu", arguments)
    shared.close(got, want, TOLERANCE, "results and gradients")


def arguments_of(rng, batch, time, width, taps, gates=()):
    """Arguments with a skip weight and gates."""
    arguments = {
        "x": rng.standard_normal((batch, time, width)),
        "kernel": rng.standard_normal((width, taps)) * np.exp(-np.arange(taps) / taps),
        "skip": rng.standard_normal(width),
    }
    return arguments | {gate: rng.standard_normal((batch, time, width)) for gate in gates}


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [(3, 50, 2, 50), (2, 200, 3, 200), (1, 200, 1, 40), (4, 130, 2, 300)], ids=str
)
@pytest.mark.parametrize("gates", [(), ("input_gate",), ("input_gate", "output_gate")], ids=len)
def test_interpreted(monkeypatch, sizes, gates):
    """One block and several, an odd number of rows, fewer taps than tokens and more."""
    small_blocks(monkeypatch)
    with pallas_triton.interpreted():
        check(arguments_of(np.random.default_rng(0), *sizes, gates))


@pytest.mark.slow
def test_interpreted_rows_and_channels_keep_their_own_scales(monkeypatch):
    """Each row of a pair, and each channel, has the error of its own numbers, which are 1e-6 to 1e6 times those of others."""
    small_blocks(monkeypatch)
    rng = np.random.default_rng(1)
    x = 10.0 ** rng.uniform(-6, 6, (3, 1, 4)) * rng.standard_normal((3, 150, 4))
    kernel = 10.0 ** rng.uniform(-6, 6, (4, 1)) * rng.standard_normal((4, 150))
    x, kernel = jnp.asarray(x, jnp.bfloat16), jnp.asarray(kernel, jnp.float32)
    with pallas_triton.interpreted():
        y, _ = long_conv(x, kernel, impl="gpu")
    for row, out in zip(np.asarray(x, np.float64), np.asarray(y, np.float64), strict=True):
        for u, k, got in zip(row.T, np.asarray(kernel, np.float64), out.T, strict=True):
            want = np.convolve(u, k)[:150]
            assert np.linalg.norm(got - want) <= 3e-3 * np.linalg.norm(want)


@pytest.mark.slow
@pytest.mark.parametrize("taps", [150, 40])
def test_interpreted_numbers_that_are_not_finite(monkeypatch, taps):
    """They reach what they reach in the plain form: outputs that see them, and no gradient."""
    small_blocks(monkeypatch)
    given = arguments_of(np.random.default_rng(2), 2, 150, 3, taps, ("input_gate", "output_gate"))
    given["x"][0, 70, 1], given["input_gate"][1, 90, 0], given["output_gate"][0, 20, 2] = (
        np.inf,
        np.nan,
        np.inf,
    )
    kernel = jnp.asarray(given.pop("kernel"), jnp.float32)
    given = {name: jnp.asarray(v, jnp.bfloat16) for name, v in given.items()}

    def run(given, kernel, impl):
        y, _ = long_conv(**given, kernel=kernel, impl=impl)
        return jnp.where(jnp.isfinite(y), y, 0).astype(jnp.float32).sum(), y

    def both(impl):
        return jax.jit(jax.value_and_grad(lambda *a: run(*a, impl), (0, 1), has_aux=True))(given, kernel)

    with pallas_triton.interpreted():
        (_, got), gradients = both("gpu")
    (_, want), plain = both("xla")
    np.testing.assert_array_equal(jnp.isnan(got), jnp.isnan(want))
    shared.close(jnp.nan_to_num(got), np.asarray(jnp.nan_to_num(want), np.float64), TOLERANCE, "outputs")
    shared.close(gradients, jax.tree.map(lambda v: np.asarray(v, np.float64), plain), TOLERANCE, "gradients")


@pytest.mark.slow
def test_lowers_for_a_gpu_by_shards():
    """Rows and channels are shared out as those of x are."""
    mesh = pallas_triton.hopper_mesh(data=4, model=2)
    spec = P("data", None, "model")
    x = jax.ShapeDtypeStruct((8, 24, 128), jnp.bfloat16, sharding=jax.NamedSharding(mesh, spec))

    def loss(x, gate):
        return gpu.long_conv(x, jnp.ones((128, 24)), jnp.ones(128), gate, gate, None, False).sum()

    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(loss, (0, 1))).trace(x, x)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert "tensor<2x24x64xbf16>" in text
        assert [aval.sharding.spec for aval in traced.jaxpr.out_avals] == [spec] * 2


def test_refusals():
    x, kernel = jnp.ones((2, 5, 3), jnp.bfloat16), jnp.ones((3, 4))
    for given, reason in (
        ({"initial_state": jnp.ones((2, 3, 3))}, "initial_state is given"),
        ({"circular": True}, "circular=True"),
        ({"x": x.astype(jnp.float16)}, "x has dtype float16; expected bfloat16"),
        ({"kernel": kernel.astype(jnp.float16)}, "kernel has dtype float16; expected float32 or bfloat16"),
        ({"x": jnp.ones((2**16, 1, 3), jnp.bfloat16)}, "x has 65536 rows; expected at most 65535"),
        ({}, "needs a Hopper GPU"),
    ):
        with pytest.raises(ValueError, match=f"impl='gpu' .* {reason}"):
            long_conv(**{"x": x, "kernel": kernel} | given, impl="gpu")


def test_few_taps_and_few_channels_are_left_to_xla():
    with devices.as_on("gpu"):
        for shape, taps, reason in (
            ((2, 2000, 512), 600, None),
            ((2, 2000, 511), 600, "batch x channels is 1022; from 1024 on they fill the GPU"),
            ((2, 2000, 512), 500, "the kernel has 500 taps; the kernels are timed from 512 on"),
            ((2, 500, 512), 600, "the kernel has 500 taps; the kernels are timed from 512 on"),
        ):
            x, kernel = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in (shape, (shape[2], taps)))
            assert gpu.passed_over_reason(x=x, kernel=kernel) == reason


@pytest.mark.parametrize(
    "time, taps, forward, backward",
    [
        (300, 4000, (64, 16, 1, 1), (64, 16, 1, 1)),
        (4096, 4096, (64, 64, 2, 2), (128, 64, 1, 1)),
        (9000, 1024, (64, 32, 9, 2), (64, 32, 9, 2)),
        (9000, 4097, (64, 64, 5, 3), (128, 64, 3, 2)),
        (9000, 4098, (64, 64, 5, 4), (128, 64, 3, 3)),
        (9000, 1, (64, 16, 18, 1), (64, 16, 18, 1)),
    ],
)
def test_plans(time, taps, forward, backward):
    for shape, pass_ in ((forward, False), (backward, True)):
        plan = transforms.plan_of(time, taps, backward=pass_)
        assert (plan.outer, plan.inner, plan.blocks, plan.lags) == shape


@pytest.mark.gpu
@pytest.mark.parametrize("gates", [(), ("input_gate", "output_gate")], ids=len)
@pytest.mark.parametrize(
    "sizes",
    [
        (2, 1, 3, 1),
        (3, 700, 5, 700),
        (2, 1500, 40, 1200),
        (4, 4096, 6, 5000),
        (1, 9000, 4, 9000),
        (3, 5000, 6, 300),
    ],
    ids=str,
)
def test_on_gpu(sizes, gates):
    """Fresh random inputs over memory that was filled with NaN."""
    poisoned(2**26)
    check(arguments_of(np.random.default_rng(), *sizes, gates))


@pytest.mark.gpu
def test_transformations_on_gpu():
    rng = np.random.default_rng()
    given = arguments_of(rng, 8, 900, 16, 900, ("input_gate", "output_gate"))
    fixed = {name: jnp.asarray(given.pop(name), jnp.float32) for name in ("kernel", "skip")}
    series = {name: jnp.asarray(v, jnp.bfloat16) for name, v in given.items()}
    want = np.asarray(long_conv(**series, **fixed, impl="xla")[0], np.float64)

    def run(series):
        return long_conv(**series, **fixed, impl="gpu")[0]

    split = jax.tree.map(lambda v: v.reshape(2, 4, *v.shape[1:]), series)
    for got, name in ((jax.jit(run)(series), "jit"), (over_one_device(run)(series), "shard_map")):
        shared.close(got, want, TOLERANCE, name)
    for got, name in ((jax.vmap(run)(split), "vmap"), (jax.lax.map(run, split), "scan")):
        shared.close(got.reshape(want.shape), want, TOLERANCE, name)
