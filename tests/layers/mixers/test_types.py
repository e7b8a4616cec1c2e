"""The contract of mixers on types: float32 stays float32, bfloat16 activations, and programs that are strict about promotion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.mixers import make_mixer
from tests.layers.mixers.table import CHOOSES, LIGHT, MIXERS
from tests.layers.mixers.test_contract import (
    BATCH,
    TIME,
    WIDTH,
    build,
    causal,
    every_mixer,
    initial_state,
    inputs,
    runner,
)


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (i % 5 > 0 or MIXERS[name][0] in LIGHT))
        for i, name in enumerate(MIXERS)
    ],
)
def test_types_do_not_depend_on_the_widest_numbers(entry):
    """With 64-bit numbers enabled, float32 stays float32: every constant has a type."""
    graph, params, rest = nnx.split(build(entry), nnx.Param, ...)
    ids = jnp.asarray(np.repeat([[1, 2, 0]], BATCH, 0).repeat(TIME // 3, 1))

    def run(params, x, ids, state):
        y, state = nnx.merge(graph, params, rest, copy=True)(x, state, segment_ids=ids)
        return y, state

    def gradients(params, x, ids):
        def loss(params, x):
            y, _ = run(params, x, ids, None)
            return y.sum(), y

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    state = initial_state(entry) if causal(entry) else None
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        results = [jax.eval_shape(gradients, params, inputs(), ids)]
        if state is not None:
            results.append(jax.eval_shape(run, params, inputs(), ids, state))
    for path, leaf in jax.tree.leaves_with_path(results):
        assert leaf.dtype not in (jnp.float64, jnp.complex128), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(entry, marks=[pytest.mark.slow] * (entry not in ("mamba2", "s5-full-spectrum")))
        for entry in MIXERS
    ],
)
def test_strict_promotion_takes_bfloat16_activations_and_initializers(entry):
    """A program that is strict about types in its own arithmetic makes, runs and trains any mixer."""

    def run(x):
        name, options = MIXERS[entry]
        model = make_mixer(name, options, given={"width": WIDTH, "dtype": x.dtype}, rngs=nnx.Rngs(0))
        return nnx.state(model, nnx.Param), jax.grad(lambda x: model(x)[0].astype(jnp.float32).sum())(x)

    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        parameters, gradient = jax.eval_shape(run, jax.ShapeDtypeStruct((2, 6, WIDTH), jnp.bfloat16))
    assert gradient.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(parameters)} == {jnp.dtype(jnp.float32)} or not parameters


@pytest.mark.slow
@every_mixer
def test_bfloat16_activations(entry):
    x = inputs()
    want, _ = runner(entry)(x)
    got, _ = runner(entry, "bfloat16")(x.astype(jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(got, np.float32) - want) / np.linalg.norm(want)
    assert error < (0.5 if MIXERS[entry][0] in CHOOSES else 2e-2)
    for leaf in jax.tree.leaves(nnx.state(build(entry, "bfloat16"), nnx.Param)):
        assert leaf.dtype == jnp.float32, "parameters are float32 whatever the activations"
