"""Mixers take the Hopper kernels by themselves, as they are: lowered here, compared with XLA on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.kernels import devices, pallas_triton
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
    "gla": {"heads": 8},
    "kda": {"heads": 8},
    "rwkv7": {},
}
# Calls that are long enough, with enough rows times heads or channels.
BY_CHANNEL = dict.fromkeys(("gla", "kda", "rwkv7"), (4, 2048, 512))
SHAPES = dict.fromkeys(MIXERS, (32, 128, 128)) | dict.fromkeys(("s5", "lru"), (4, 704, 128)) | BY_CHANNEL
KERNELS = dict.fromkeys(MIXERS, "@mosaic_gpu_v2") | dict.fromkeys(BY_CHANNEL, "xla.gpu.triton")


def both_passes(name, dtype="bfloat16"):
    """A function of variables and inputs that gives outputs and gradients; and variables."""
    given = {"width": SHAPES[name][2], "dtype": jnp.dtype(dtype)}
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
    with devices.as_on("gpu"), jax.sharding.use_abstract_mesh(pallas_triton.hopper_mesh()):
        text = jax.jit(run).trace(variables, x, weights).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(KERNELS[name]) >= 2  # of either pass


@pytest.mark.gpu
@pytest.mark.parametrize("name", MIXERS)
def test_kernels_are_as_exact_as_xla_on_gpu(monkeypatch, name):
    """Both round activations to bfloat16, which sums of gradients over tokens amplify: float32 says by how much."""
    run, variables = both_passes(name)
    x, weights = np.random.default_rng().standard_normal((2, *SHAPES[name]))
    x, weights = jnp.asarray(x, jnp.bfloat16), jnp.asarray(weights, jnp.float32)
    kernels = jax.jit(run).lower(variables, x, weights)
    assert KERNELS[name] in kernels.as_text()
    monkeypatch.setattr(devices, "hopper_refusal", lambda: "XLA is asked for")
    plain = jax.jit(lambda *given: run(*given)).lower(variables, x, weights)
    assert not any(kernel in plain.as_text() for kernel in set(KERNELS.values()))
    exact, _ = both_passes(name, "float32")
    with jax.default_matmul_precision("highest"):
        wanted = jax.jit(exact)(variables, x.astype(jnp.float32), weights)
    found = (lowered.compile()(variables, x, weights) for lowered in (kernels, plain))
    for path, want, one, other in zip(*_leaves(wanted, *found), strict=True):
        ours, theirs = (np.linalg.norm(v - want) / max(np.linalg.norm(want), 1e-30) for v in (one, other))
        assert ours <= 1.5 * theirs + 1e-2, f"{path}: relative error {ours:.1e}, of XLA {theirs:.1e}"


def _leaves(*trees):
    """The names of the leaves, and the leaves of each tree in float64."""
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(trees[0])]
    return paths, *([np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)] for tree in trees)
