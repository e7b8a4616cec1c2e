"""Attention inside a scan over layers, whose derivative must not keep a number per query and key."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from layers.kernels.attention import attention
from layers.kernels.sequence_parallel import attention_by

HEADS, TIME, FEATURES = 2, 2048, 16


@pytest.mark.sample(3)
@pytest.mark.parametrize("method", [None, "all_gather", "ring", "zigzag", "balanced_ring", "token_ring"])
@pytest.mark.parametrize("remat", [False, True])
def test_no_array_of_the_derivative_holds_all_logits(method, remat):
    def layer(x, scale):
        return attention(scale * x, 2 * x, x, causal=True), None

    layer = jax.checkpoint(layer, prevent_cse=False) if remat else layer

    def loss(x, scales):
        return jax.lax.scan(layer, x, scales)[0].sum()

    shapes = (
        jax.ShapeDtypeStruct((1, TIME, HEADS, FEATURES), jnp.float32),
        jax.ShapeDtypeStruct((3,), jnp.float32),
    )
    gradient = jax.grad(loss, (0, 1))
    if method is None:
        jaxpr = jax.make_jaxpr(gradient)(*shapes)
    else:
        mesh = jax.make_mesh((2,), ("sequence",), (AxisType.Auto,), devices=jax.devices()[:2])
        with jax.set_mesh(mesh), attention_by(method):
            jaxpr = jax.make_jaxpr(gradient)(*shapes)
    kept = 3 * HEADS * TIME * FEATURES  # of three layers, and twice that of keys that both devices gathered
    found = largest(jaxpr.jaxpr)
    assert found <= 2 * kept < TIME * TIME / 8


def largest(jaxpr):
    """The most numbers of an array that is computed in a program or a part of it."""
    sizes = [getattr(v.aval, "size", 0) for equation in jaxpr.eqns for v in equation.outvars]
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(getattr(x, "jaxpr", x), "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            sizes += [largest(inner)] if hasattr(inner, "eqns") else []
    return max(sizes, default=0)
