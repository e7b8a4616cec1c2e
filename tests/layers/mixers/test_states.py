"""States that do not fit are refused, for every mixer; whole models are in tests/seqmodels/test_states.py."""

import jax
import jax.numpy as jnp
import pytest

from layers.mixer import MixerState
from tests.layers.mixers.test_contract import BATCH, build, causal, every_mixer, inputs


def changed(state, change):
    """The state with its first array of numbers changed, the place left alone."""
    leaves, tree = jax.tree.flatten(state.carried)
    return state._replace(carried=jax.tree.unflatten(tree, [change(leaves[0]), *leaves[1:]]))


WRONG = {
    "fewer rows": lambda state: jax.tree.map(lambda leaf: leaf[:1], state),
    "more rows": lambda state: jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), state),
    "the carried rows of another batch": lambda state: state._replace(
        carried=jax.tree.map(lambda leaf: leaf[:1], state.carried)
    ),
    "the place of another batch": lambda state: state._replace(
        place=jax.tree.map(lambda leaf: leaf[:1], state.place)
    ),
    "another mixer": lambda state: state._replace(carried=(state.carried, jnp.zeros((BATCH, 3)))),
    "nothing carried": lambda state: state._replace(carried=None),
    "no place": lambda state: state._replace(place=None),
    "only what is carried": lambda state: state.carried,
    "another size": lambda state: changed(state, lambda leaf: jnp.concatenate([leaf, leaf], axis=-1)),
    "another kind of number": lambda state: changed(
        state, lambda leaf: leaf.astype(jnp.int32) if jnp.isrealobj(leaf) else leaf.real
    ),
    "a number": lambda state: changed(state, lambda leaf: 0.0),
}


@pytest.mark.sample(4)
@every_mixer
def test_a_state_that_does_not_fit_is_refused(entry):
    mixer, x = build(entry), inputs(3)
    if not causal(entry):
        with pytest.raises(ValueError, match="not causal here and has no state"):
            mixer(x, MixerState((), None))
        return
    state = mixer.init_state(BATCH, max_length=8)
    for change in WRONG.values():
        with pytest.raises((TypeError, ValueError), match=rf"(state|place).* of {type(mixer).__name__}"):
            mixer(x, change(state))
    # Any length of cache is one.
    jax.eval_shape(mixer, x, mixer.init_state(BATCH, max_length=40))


def test_parts_of_caches_of_different_lengths_are_refused():
    mixer = build("attention")
    short, long = (mixer.init_state(BATCH, max_length=length) for length in (6, 8))
    mixed = short._replace(carried=short.carried._replace(entries=long.carried.entries))
    with pytest.raises(ValueError, match=r"state.* of Attention has shape \(2, 6\); expected \(2, 8\)"):
        mixer(inputs(3), mixed)


@pytest.mark.sample(20)
@every_mixer
def test_rows_without_tokens_and_batches_without_rows_are_mixed(entry):
    mixer = build(entry)
    for shape in ((BATCH, 0), (0, 3)):
        x = inputs(3)[:1, :1] * jnp.ones((*shape, 1))
        for ids in (None, jnp.ones(shape, jnp.int32)):
            y = jax.eval_shape(lambda x, ids: mixer(x, segment_ids=ids)[0], x, ids)
            assert y.shape == x.shape
