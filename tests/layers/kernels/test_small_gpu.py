"""One small call of every Hopper kernel, both passes, beside XLA on the CPU: quick enough for NVIDIA's compute-sanitizer.

    XLA_PYTHON_CLIENT_ALLOCATOR=platform XLA_FLAGS="--xla_gpu_autotune_level=0 --xla_gpu_cublas_fallback=false" \
        compute-sanitizer --tool memcheck python -m pytest -m gpu tests/layers/kernels/test_small_gpu.py

and with `--tool racecheck`. With the platform's allocator every array is an allocation, whose ends are watched. Where XLA tries
out matrix products, the sanitizer of CUDA 13.0 breaks down; the flags keep it from that.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.kernels.delta_rule import delta_rule, dplr_delta_rule
from layers.kernels.gated_linear_attention import gated_linear_attention
from layers.kernels.linear_recurrence import linear_recurrence
from layers.kernels.segments import Segments
from layers.kernels.short_conv import short_conv

BATCH, TIME, HEADS, WIDTH = 2, 77, 2, 64


def recurrence():
    rng = np.random.default_rng(0)
    a, x = rng.uniform(0.5, 1.0, (BATCH, TIME, 136)), rng.standard_normal((BATCH, TIME, 136))
    return linear_recurrence, {"a": jnp.asarray(a, jnp.float32), "x": jnp.asarray(x, jnp.float32)}, 2e-5


def convolution():
    rng = np.random.default_rng(0)
    shapes = {"x": (BATCH, TIME, 136), "weight": (4, 136), "bias": (136,), "initial_state": (BATCH, 3, 136)}
    arguments = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    return functools.partial(short_conv, activation="silu"), arguments, 2e-5


def attention(decay):
    rng = np.random.default_rng(0)
    arguments = {name: rng.standard_normal((BATCH, TIME, HEADS, WIDTH)) for name in ("q", "k", "v")}
    arguments["k"] /= np.linalg.norm(arguments["k"], axis=-1, keepdims=True)
    arguments = {name: jnp.asarray(value, jnp.bfloat16) for name, value in arguments.items()}
    if decay:
        arguments["log_decay"] = -jnp.asarray(rng.exponential(0.2, (BATCH, TIME, HEADS)), jnp.float32)
    return arguments


def scalar_decay():
    return gated_linear_attention, attention(True), 2e-2


def shared_keys():
    arguments = attention(True)
    return gated_linear_attention, arguments | {name: arguments[name][:, :, :1] for name in ("q", "k")}, 2e-2


def shared_keys_of_many():
    """Enough heads, of the widths, that blocks take several."""
    arguments = attention(True)
    many = {
        name: jnp.tile(arguments[name], (1, 1, 4) + (1,) * (arguments[name].ndim - 3))
        for name in ("v", "log_decay")
    }
    wide = {name: jnp.tile(arguments[name][:, :, :1], (1, 1, 1, 2)) for name in ("q", "k")}
    return gated_linear_attention, many | wide, 2e-2


def gated_delta_rule():
    beta = np.random.default_rng(1).uniform(0.1, 0.9, (BATCH, TIME, HEADS))
    return delta_rule, attention(True) | {"beta": jnp.asarray(beta, jnp.float32)}, 2e-2


def by_channel(arguments):
    """The arguments with a decay per key channel."""
    return arguments | {"log_decay": arguments["log_decay"][..., None] * jnp.linspace(0.0, 2.0, WIDTH)}


def channel_delta_rule():
    function, arguments, tolerance = gated_delta_rule()
    return function, by_channel(arguments), tolerance


def general_delta_rule():
    arguments = by_channel(attention(True))
    rate = jnp.asarray(np.random.default_rng(1).uniform(0.1, 0.9, (BATCH, TIME, HEADS, 1)), jnp.bfloat16)
    return dplr_delta_rule, arguments | {"a": -arguments["k"], "b": rate * arguments["k"]}, 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize(
    "call",
    [
        recurrence,
        convolution,
        scalar_decay,
        shared_keys,
        shared_keys_of_many,
        gated_delta_rule,
        channel_delta_rule,
        general_delta_rule,
    ],
    ids=lambda call: call.__name__,
)
@pytest.mark.parametrize("segments", [False, True], ids=["whole", "segments"])
def test_small_call(call, segments):
    function, arguments, tolerance = call()
    ids = None
    if segments and call is convolution:
        ids = np.repeat([[1, 2, 3, 0]], BATCH, 0).repeat([30, 2, 30, 15], 1)
        ids = Segments.of(jnp.asarray(ids), padding="end")
    elif segments:
        ids = jnp.asarray(np.repeat([[1, 0, 2, 3]], BATCH, 0).repeat([30, 7, 20, 20], 1))

    def passes(impl, arguments, ids):
        def loss(arguments, ids):
            output, state = function(**arguments, segment_ids=ids, impl=impl)
            return (output.astype(jnp.float32) ** 2).sum() + state.sum(), (output, state)

        (_, results), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arguments, ids)
        return jax.tree.leaves_with_path((results, gradients))

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        expected = passes("xla", *jax.device_get((arguments, ids)))
    for (path, got), (_, want) in zip(passes("gpu", arguments, ids), expected, strict=True):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: relative difference {error:.1e}"
