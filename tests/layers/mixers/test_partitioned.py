"""Mixers without a form over time, left to the compiler on devices that divide time: outputs and gradients of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from layers.mixers import make_mixer
from layers.segments import Segments
from layers.sharding import MESH_AXES
from tests.layers.mixers.table import MIXERS

WITHOUT = (
    "atlas",
    "fnet",
    "lstm",
    "slstm",
    "hypermixer",
    "linformer",
    "wersa",
    "linear_attention-bidirectional",
    "lightweight_conv",
    "dynamic_conv",
    "gss",
    "log_linear_mamba2",
    "mesa_net",
    "path_attention",
    "s4nd",
    "titans",
    "ttt_linear",
    *(
        "bigbird",
        "core_context",
        "etc",
        "informer",
        "longformer",
        "longt5",
        "longt5-local",
        "luna",
        "luna-carried",
        "moba",
        "nsa",
        "nystromformer",
        "power_attention",
        "shifted_sparse",
        "strided_attention",
    ),
)
IDS = np.repeat([[1, 2, 0], [1, 1, 3]], [7, 11, 6], axis=1)


@pytest.mark.sample(len(WITHOUT))
@pytest.mark.parametrize("name", WITHOUT)
def test_what_the_compiler_partitions_is_what_one_device_gives(name):
    mixer = make_mixer(
        MIXERS[name][0], MIXERS[name][1], given=dict(width=8, dtype=jnp.float32), rngs=nnx.Rngs(0)
    )
    graph, variables = nnx.split(mixer)
    x, weights = (
        jnp.asarray(a, jnp.float32) for a in np.random.default_rng(0).standard_normal((2, 2, 24, 8))
    )

    @jax.jit
    def run(variables, x, ids):
        def loss(variables, x):
            y, _ = nnx.merge(graph, variables, copy=True)(x, segment_ids=Segments.of(ids, padding="end"))
            return (weights * y).sum(), y

        return jax.grad(loss, argnums=(0, 1), has_aux=True, allow_int=True)(variables, x)

    want = run(variables, x, jnp.asarray(IDS, jnp.int32))
    shape = tuple(4 if axis == "sequence" else 1 for axis in MESH_AXES)
    mesh = jax.make_mesh(shape, MESH_AXES, (AxisType.Auto,) * len(shape), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        cut = NamedSharding(mesh, P(None, "sequence"))
        got = run(variables, jax.device_put(x, cut), jax.device_put(jnp.asarray(IDS, jnp.int32), cut))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if one.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(one, other, atol=2e-5 * max(1, np.abs(other).max()))
