"""Mixers take the Hopper kernels by themselves, as they are: lowered here, compared with XLA on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.kernels import devices
from layers.mixers import make_mixer

MIXERS = {
    "s5": {"state_size": 16, "bidirectional": True},
    "lru": {},
    "rg_lru": {},
    "retnet": {"heads": 2},
    "lightning_attention": {"heads": 2},
    "mamba2": {"head_dim": 32, "state_size": 64},
    "deltanet": {"heads": 2},
    "gated_deltanet": {"heads": 2},
    "linear_attention": {"heads": 2},
    "hgrn": {},
}
SHAPES = dict.fromkeys(MIXERS, (32, 128, 128)) | dict.fromkeys(("s5", "lru"), (4, 704, 128))
TOLERANCE = 3e-2  # activations are rounded to bfloat16 between the parts of a mixer too


def both_passes(name):
    """A function of variables and inputs that gives outputs and gradients; and variables."""
    given = {"width": SHAPES[name][2], "dtype": jnp.dtype("bfloat16")}
    graph, variables = nnx.split(make_mixer(name, MIXERS[name], given=given, rngs=nnx.Rngs(0)))

    def loss(variables, x, weights):
        y, _ = nnx.merge(graph, variables, copy=True)(x)
        return (y.astype(jnp.float32) * weights).sum(), y

    def passes(variables, x, weights):
        (_, y), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(variables, x, weights)
        return y, gradients

    return passes, variables


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXERS)
def test_mixers_take_kernels(name):
    run, variables = both_passes(name)
    x, weights = (jax.ShapeDtypeStruct(SHAPES[name], dtype) for dtype in (jnp.bfloat16, jnp.float32))
    with devices.as_on("gpu"):
        text = jax.jit(run).trace(variables, x, weights).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") >= 2  # of either pass


@pytest.mark.gpu
@pytest.mark.parametrize("name", MIXERS)
def test_kernels_agree_with_xla_on_gpu(monkeypatch, name):
    run, variables = both_passes(name)
    x, weights = np.random.default_rng().standard_normal((2, *SHAPES[name]))
    arguments = variables, jnp.asarray(x, jnp.bfloat16), jnp.asarray(weights, jnp.float32)
    kernels = jax.jit(run).lower(*arguments)
    assert "@mosaic_gpu_v2" in kernels.as_text()
    monkeypatch.setattr(devices, "hopper_refusal", lambda: "XLA is asked for")
    plain = jax.jit(lambda *given: run(*given)).lower(*arguments)
    assert "@mosaic_gpu_v2" not in plain.as_text()
    got, want = (jax.tree.leaves_with_path(lowered.compile()(*arguments)) for lowered in (kernels, plain))
    for (path, one), (_, other) in zip(got, want, strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        error = np.linalg.norm(one - other) / max(np.linalg.norm(other), 1e-30)
        assert error <= TOLERANCE, f"{jax.tree_util.keystr(path)}: relative difference {error:.1e}"
