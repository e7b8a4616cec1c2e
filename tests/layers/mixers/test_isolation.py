"""The contract of mixers where numbers are not finite: they reach no earlier token, no other segment, and nothing from padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.adapters import dropping
from layers.parameters import AuxiliaryLoss
from tests.layers.mixers.test_contract import (
    BATCH,
    TIME,
    assert_close,
    build,
    causal,
    every_mixer,
    initial_state,
    inputs,
    runner,
)

EARLY = (slice(None), slice(0, 17))


@pytest.mark.sample(4)
@every_mixer
def test_what_is_not_finite_reaches_no_earlier_output(entry):
    whole, _ = runner(entry)(inputs())
    for fill in (np.nan, np.inf):
        got, _ = runner(entry)(inputs().at[:, EARLY[1].stop :].set(fill))
        if causal(entry):
            assert_close(got, whole, where=EARLY)
        else:
            assert not np.isfinite(got).all()


@pytest.mark.slow
@every_mixer
def test_what_is_not_finite_reaches_no_gradient_of_an_earlier_input(entry):
    if not causal(entry):
        assert build(entry).causal is False
        return
    run = runner(entry)  # made here, so that no parameter is one of the traced function

    @jax.jit
    @jax.grad
    def gradient(x):
        return jnp.square(run(x)[0][EARLY]).sum()

    want = gradient(inputs())
    for fill in (np.nan, np.inf):
        got = gradient(inputs().at[:, EARLY[1].stop :].set(fill))
        assert_close(got, want, where=EARLY)


@pytest.mark.sample(4)
@pytest.mark.smoke
@every_mixer
def test_gradients_are_finite_and_reach_every_parameter(entry):
    """Whatever stands in the padding: 0 x NaN is NaN, in the gradients of weights as much as in outputs."""
    graph, params, rest = nnx.split(build(entry), nnx.Param, ...)
    ids = jnp.asarray(np.repeat([[0, 1, 2, 0]], BATCH, 0).repeat(TIME // 4, 1))
    padding, weights = np.asarray(ids) == 0, inputs(seed=2)

    @jax.jit
    def gradients(params, x, weights):
        def loss(params, x):
            model = nnx.merge(graph, params, rest, copy=True)
            # As in training: what chooses tokens may learn by a loss of its own alone.
            with jax.numpy_dtype_promotion("strict"), dropping(jax.random.key(0)):
                y, _ = model(x, segment_ids=ids)
            own = sum(jax.tree.leaves(nnx.state(model, AuxiliaryLoss)), jnp.zeros(()))
            return jnp.sum(jnp.where(weights != 0, y * weights, 0)) + own, y

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    clean, y = gradients(params, inputs(), jnp.where(padding[..., None], 0, weights))
    by_parameter, by_input = clean
    for path, gradient in jax.tree.leaves_with_path(by_parameter):
        assert np.isfinite(gradient).all(), path
        assert np.abs(gradient).max() > 1e-12, f"{jax.tree_util.keystr(path)} has no gradient"
    assert np.isfinite(by_input).all()
    assert (np.asarray(by_input)[padding] == 0).all(), "padding has a gradient"
    for fill in (np.nan, np.inf):
        x = jnp.where(padding[..., None], fill, inputs())
        jax.tree.map(
            np.testing.assert_array_equal,
            gradients(params, x, jnp.where(padding[..., None], 0, weights))[0],
            clean,
        )
        # What another segment holds reaches neither the outputs of a segment nor their derivatives.
        for number in (1, 2):
            own = np.asarray(ids) == number
            seen = jnp.where(own[..., None], weights, 0)
            (_, want), _ = gradients(params, inputs(), seen)
            (_, got), other = gradients(params, jnp.where(own[..., None], inputs(), fill), seen)
            assert_close(other, y, where=own)
            assert_close(got, want, where=own)


@pytest.mark.slow
@pytest.mark.parametrize("carrying", ["lstm", "rwkv4", "slstm", "wersa-causal"])
def test_a_state_that_is_not_finite_stays_in_its_row_and_segment(carrying):
    """In mixers whose own equation carries numbers from token to token."""
    run, x = runner(carrying), inputs()
    ids = np.repeat([[1, 2], [1, 1]], TIME // 2, 1)
    _, state = run(x, initial_state(carrying), jnp.ones((BATCH, TIME), jnp.int32))
    spoiled = state._replace(carried=jax.tree.map(lambda leaf: leaf.at[0].set(np.nan), state.carried))
    reached = (np.arange(BATCH) == 0)[:, None] & (ids == 1)

    def loss(x, state):
        y, after = run(x, state, jnp.asarray(ids))
        return jnp.sum(jnp.where(reached[..., None], 0, y) ** 2), (y, after)

    want, (y, after) = jax.grad(loss, has_aux=True)(x, state)
    gradient, (got, ended) = jax.grad(loss, has_aux=True)(x, spoiled)
    assert np.isnan(got[reached]).all()
    assert_close(got, y, where=~reached)
    assert_close(gradient, want)
    jax.tree.map(assert_close, ended, after)
