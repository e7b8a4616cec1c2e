"""Kernels on meshes with automatic axes: every device runs them on its part, and the results are those of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from layers.kernels import devices, dispatch, mosaic_gpu, partition
from layers.kernels.delta_rule import delta_rule
from layers.kernels.delta_rule import gpu as delta_gpu
from layers.kernels.delta_rule import xla as delta_xla
from layers.kernels.gated_linear_attention import gated_linear_attention
from layers.kernels.gated_linear_attention import gpu as attention_gpu
from layers.kernels.gated_linear_attention import xla as attention_xla
from layers.kernels.linear_recurrence import gpu as recurrence_gpu
from layers.kernels.linear_recurrence import linear_recurrence
from layers.kernels.linear_recurrence import xla as recurrence_xla
from layers.kernels.linear_recurrence.gpu import kernels
from layers.kernels.segments import Segments
from layers.kernels.short_conv import gpu as convolution_gpu
from layers.kernels.short_conv import short_conv
from layers.kernels.short_conv import xla as convolution_xla

TIME = 21
MESHES = {"data": {"data": 2}, "fsdp": {"fsdp": 2}, "data_and_tensor": {"data": 2, "tensor": 2}}
IDS = np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], [9, 4, 5, 3], axis=1).astype(np.int32)


def mesh_of(**sizes):
    """A mesh with the axes of training; those that are not named have size 1."""
    shape = tuple(sizes.get(name, 1) for name in ("data", "fsdp", "tensor", "sequence", "expert"))
    count = int(np.prod(shape))
    names = "data", "fsdp", "tensor", "sequence", "expert"
    return jax.make_mesh(shape, names, (AxisType.Auto,) * 5, devices=jax.devices()[:count])


def recurrence():
    rng = np.random.default_rng(0)
    a, x = rng.uniform(0.5, 1.0, (2, TIME, 16)), rng.standard_normal((2, TIME, 16))
    state = rng.standard_normal((2, 16))
    given = {"a": a, "x": x, "initial_state": state}
    return linear_recurrence, {name: jnp.asarray(value, jnp.float32) for name, value in given.items()}, 2e-5


def convolution():
    rng = np.random.default_rng(3)
    shapes = {"x": (2, TIME, 16), "weight": (4, 16), "bias": (16,), "initial_state": (2, 3, 16)}
    given = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    return functools.partial(short_conv, activation="silu"), given, 2e-5


def attention():
    rng = np.random.default_rng(1)
    given = {name: rng.standard_normal((2, TIME, 2, 64)) for name in ("q", "k", "v")}
    given["k"] /= np.linalg.norm(given["k"], axis=-1, keepdims=True)
    given = {name: jnp.asarray(value, jnp.bfloat16) for name, value in given.items()}
    given["log_decay"] = -jnp.asarray(rng.exponential(0.2, (2, TIME, 2)), jnp.float32)
    return gated_linear_attention, given, 2e-2


def delta():
    _, given, tolerance = attention()
    beta = np.random.default_rng(2).uniform(0.1, 0.9, (2, TIME, 2))
    return delta_rule, given | {"beta": jnp.asarray(beta, jnp.float32)}, tolerance


def both(function, impl):
    """Outputs, and gradients of a sum of their squares."""

    def loss(arguments, segments):
        y, state = function(**arguments, segment_ids=segments, impl=impl)
        total = (y.astype(jnp.float32) ** 2).sum() + (state**2).sum()
        return total, (y, state)

    return jax.jit(jax.grad(loss, has_aux=True))


def recurrence_by_xla(a, x, state, codes, call):
    start, padding = codes == kernels.RESET, codes == kernels.SKIPPED
    return recurrence_xla._recurrence(a, x, state, start, padding, call.reverse)


def convolution_by_xla(x, weight, bias, state, codes, call):
    """Segments from the codes: padding is -1, and a token that takes none before it begins a segment."""
    ids = jnp.where(codes < 0, 0, 1 + jnp.cumsum(codes == 0, axis=1, dtype=jnp.int32))
    segments = Segments.of(ids, padding="end")
    return convolution_xla.short_conv(x, weight, bias, "silu" if call.silu else None, state, segments)[0]


def attention_by_xla(call, q, k, v, g, number, state):
    segments = None if number is None else Segments.of(number, padding="end")
    return attention_xla.gated_linear_attention(q, k, v, g, None, call.scale, False, state, segments, 1e-6)


def delta_by_xla(scale, normalize_qk, settings, *arguments):
    *arrays, state, segments = arguments
    return delta_xla.delta_rule(*arrays, scale, normalize_qk, state, segments)


CALLS = {
    "linear_recurrence": (recurrence, recurrence_gpu, "_recurrence", recurrence_by_xla),
    "short_conv": (convolution, convolution_gpu, "_convolution", convolution_by_xla),
    "gated_linear_attention": (attention, attention_gpu, "_padded", attention_by_xla),
    "delta_rule": (delta, delta_gpu, "_local", delta_by_xla),
}


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "name, mesh",
    [
        pytest.param(name, mesh, marks=[pytest.mark.slow] * (mesh != "data_and_tensor"))
        for name in CALLS
        for mesh in MESHES
    ],
)
def test_parts_of_devices_make_the_whole(monkeypatch, name, mesh):
    """Values and gradients are those without a mesh.

    The interpreter runs one kernel at a time and devices run side by side, so that XLA stands in for the kernel of each.
    """
    make, module, local, stand_in = CALLS[name]
    function, arguments, tolerance = make()
    segments = Segments.of(jnp.asarray(IDS), padding="end")
    want = jax.device_get(both(function, "xla")(arguments, segments))
    assert mosaic_gpu._probe_refusal(module._probe) is None  # of the kernel itself, and remembered
    monkeypatch.setattr(module, local, stand_in)
    context = dispatch.preferred({name: "gpu"})
    with jax.set_mesh(mesh_of(**MESHES[mesh])), devices.as_on("gpu"), context, dispatch.noted() as taken:
        got = jax.device_get(both(function, None)(arguments, segments))
    assert set(taken) == {(name, "gpu")}
    for (path, one), other in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        one, other = (np.asarray(x, np.float64) for x in (one, other))
        error = np.linalg.norm(one - other) / np.linalg.norm(other)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: relative difference {error:.1e}"


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", CALLS)
def test_a_device_gets_its_part(name):
    """Lowered for GPUs, the kernels of both passes read the rows and heads or channels of one device."""
    function, arguments, _ = CALLS[name][0]()
    context = dispatch.preferred({name: "gpu"})
    with jax.set_mesh(mesh_of(data=2, tensor=2)), devices.as_on("gpu"), context, dispatch.noted() as taken:
        traced = both(function, None).trace(arguments, Segments.of(jnp.asarray(IDS), padding="end"))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert set(taken) == {(name, "gpu")}
    assert text.count("@mosaic_gpu_v2") >= 2
    kernels_read = [line for line in text.splitlines() if "@mosaic_gpu_v2" in line]
    assert all("tensor<1x" in line for line in kernels_read)


def test_specs_follow_the_convention():
    x = jnp.zeros((6, 8, 3))
    assert partition.spec_of(x, heads=2) == P(None, None, None)
    with jax.set_mesh(mesh_of(data=2, fsdp=2, tensor=2)):
        assert partition.spec_of(x, heads=2) == P("data", None, None)
        assert partition.spec_of(x, heads=1) == P("data", "tensor", None)
        assert partition.spec_of(jnp.zeros((4, 2)), heads=1) == P(("data", "fsdp"), "tensor")

        def inside(x):
            assert partition.spec_of(x) == P(None)
            assert partition.passed_over_reason(x) is None
            return x

        every = P(("data", "fsdp", "tensor"))
        jax.eval_shape(jax.shard_map(inside, in_specs=every, out_specs=every), jnp.zeros(8))


@pytest.mark.parametrize(
    "sizes, reason",
    [
        ({}, None),
        ({"data": 2, "tensor": 2}, None),
        ({"data": 4}, "6 rows cannot be divided over 4 devices"),
        ({"sequence": 2}, "divides time over 'sequence'"),
    ],
)
def test_reasons(sizes, reason):
    x = jnp.zeros((6, 8, 3))
    with jax.set_mesh(mesh_of(**sizes)):
        got = partition.passed_over_reason(x)
    assert got is None if reason is None else reason in got


def test_meshes_that_say_nothing():
    x = jnp.zeros((6, 8, 3))
    assert "several devices and no mesh; call jax.set_mesh" in partition.passed_over_reason(x)
    with jax.set_mesh(jax.make_mesh((2,), ("model",), (AxisType.Auto,), devices=jax.devices()[:2])):
        assert "divides over 'model'" in partition.passed_over_reason(x)
