"""What the states of layers have in common is carried once: restored, states are what they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import seqmodels
from seqmodels.common_state import lean, whole

# Full, windowed and forgetting attention whose caches have as many slots, each twice, and a recurrence.
MIXERS = {
    "attention": {"heads": 2},
    "local": {"mixer": "attention", "heads": 2, "window": 12},
    "forgetting_attention": {"heads": 2},
    "lru": {"state_size": 4},
}
CONFIG = dict(kind="language_model", vocab_size=11, width=8, channel="none", mixers=MIXERS, scan=False)
SLOTS = 12


@pytest.fixture(scope="module")
def states():
    """The config of a stack, and states before and after 15 tokens, of which some are padding: more than the windows hold."""
    config = CONFIG | dict(depth=8, pattern=(*MIXERS,), absolute_positions="sinusoidal")
    model = seqmodels.build_model(config, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 15)))
    ids = jnp.asarray([[0] * 2 + [1] * 10 + [2] * 3, [1] * 3 + [3] * 5 + [0] * 2 + [3] * 5], jnp.int32)

    @jax.jit
    def run(model, tokens):
        first = model.init_state(2, max_length=SLOTS)
        return first, model(tokens, first, segment_ids=ids)[1]

    return model.config.stack, run(model, tokens)


def test_restored_states_are_what_they_were(states):
    stack, found = states
    for state in found:
        again = whole(stack, lean(stack, state))
        assert jax.tree.structure(again) == jax.tree.structure(state)
        for got, want in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
            np.testing.assert_array_equal(got, want)


def test_what_layers_have_in_common_is_left_once(states):
    """One place of three numbers, and three facts of each kind of cache; all else is there per layer."""
    stack, (_, state) = states
    of_layers = [len(jax.tree.leaves(layer.carried)) for layer in state.layers[:4]]
    caches = 3 * 3
    assert len(jax.tree.leaves(lean(stack, state))) == 3 + 2 * (sum(of_layers) - caches) + caches
    assert of_layers == [5, 5, 7, 1]
