"""`Segments` that know where padding stands, and whether rows are packed, give what raw ids give: every mixer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.segments import Segments
from tests.layers.mixers.test_contract import (
    BATCH,
    FIRST,
    SHORT,
    TIME,
    assert_close,
    build,
    causal,
    inputs,
    runner,
)

# Several segments in each row, and one in each row; padding is at the ends of both.
PACKED = np.repeat([[3, 5, 3, 0], [1, 2, 0, 0]], TIME // 4, axis=1).astype(np.int32)
PACKED[1, TIME // 2 : TIME // 2 + 5] = [2, 2, 9, 9, 2]
SINGLE = np.where(np.arange(TIME)[None] < np.asarray([[TIME - 9], [TIME - 2]]), [[4], [1]], 0).astype(
    np.int32
)
KINDS = {"packed": (PACKED, True), "single": (SINGLE, False)}


def given(kind, form):
    """The ids of this kind, raw or as `Segments` that say all that is known."""
    ids, packed = KINDS[kind]
    return jnp.asarray(ids) if form == "raw" else Segments.of(jnp.asarray(ids), padding="end", packed=packed)


@functools.cache
def differentiated(entry):
    """Outputs at tokens, and gradients by parameters and inputs, as one jitted function of inputs and segments."""
    graph, params, rest = nnx.split(build(entry), nnx.Param, ...)
    weights = inputs(seed=2)

    @jax.jit
    def run(x, segments):
        real = ((segments.ids if isinstance(segments, Segments) else segments) != 0)[..., None]

        def loss(params, x):
            y, _ = nnx.merge(graph, params, rest, copy=True)(x, segment_ids=segments)
            return jnp.where(real, y * weights, 0).sum(), jnp.where(real, y, 0)

        (_, y), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return y, gradients

    return run


# One mixer of every family by default, and either kind of rows for the first line of every mixer where slow tests run.
SAMPLE = {
    "s5": "single",
    "mamba": "packed",
    "attention": "packed",
    "gated_deltanet": "packed",
    "hyena": "single",
}
EVERY = {entry: list(KINDS)[number % 2] for number, entry in enumerate(FIRST.values())}


@pytest.mark.sample(5)
@pytest.mark.parametrize(
    "entry, kind",
    [
        *SAMPLE.items(),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in EVERY.items()
            if pair not in SAMPLE.items()
        ),
    ],
)
def test_outputs_and_gradients_equal_those_with_raw_ids(entry, kind):
    # What stands at padding must not matter.
    x = jnp.where((KINDS[kind][0] != 0)[..., None], inputs(), 1e3)
    got, want = (differentiated(entry)(x, given(kind, form)) for form in ("segments", "raw"))
    assert np.abs(want[0]).max() > 0
    for (path, one), other in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        try:
            assert_close(one, other)
        except AssertionError as error:
            error.add_note(jax.tree_util.keystr(path))
            raise


@pytest.mark.slow
@pytest.mark.parametrize("entry, kind", EVERY.items())
def test_states_equal_those_with_raw_ids(entry, kind):
    """Outputs beside a state, and what follows it, within the last segment of each row."""
    if not causal(entry):
        assert build(entry).causal is False
        return
    x, begin = inputs(), build(entry).init_state(BATCH, max_length=2 * TIME)
    (got, state), (want, other) = (runner(entry)(x, begin, given(kind, form)) for form in ("segments", "raw"))
    assert_close(got, want, where=KINDS[kind][0] != 0)
    jax.tree.map(np.testing.assert_array_equal, state.place, other.place)
    following = inputs(SHORT, seed=1)
    assert_close(runner(entry)(following, state)[0], runner(entry)(following, other)[0])


def test_the_ids_of_these_tests_are_what_they_say():
    for ids, packed in KINDS.values():
        real = ids != 0
        assert (real[:, :-1] | ~real[:, 1:]).all(), "padding is at the ends"
        assert real.any(1).all()
        assert not real.all(1).any()
        assert (np.asarray(Segments.of(jnp.asarray(ids)).numbers).max(1) > 1).all() == packed
    assert PACKED.shape == SINGLE.shape == (BATCH, TIME)
