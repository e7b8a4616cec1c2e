"""Mixers say which of CAB's four patterns options give them (arXiv:2210.07661), and cross-attention reads all of its source."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.mixer import EVERY
from layers.mixers import MIXERS, make_mixer
from tests.layers.mixers.table import MIXERS as TABLE

GIVEN = dict(width=8, heads=2, position="none", causal=False)


@pytest.mark.slow
def test_every_mixer_of_the_table_is_used_in_a_pattern_that_it_names():
    used = {}
    for name, options in TABLE.values():
        make = partial(make_mixer, name, options, given=dict(width=8))
        made = nnx.eval_shape(lambda make=make: make(rngs=nnx.Rngs(0)))
        used.setdefault(name, set()).add("causal_self" if made.causal else "noncausal_self")
    for name, found in used.items():
        assert found <= set(MIXERS[name][1].patterns) <= set(EVERY), name


def test_names_of_patterns_belong_to_mixers_that_have_them():
    reads = {name for name, (_, mixer) in MIXERS.items() if "causal_cross" in mixer.patterns}
    assert reads == {"attention", "gated_attention"}
    for name in reads:
        assert set(MIXERS[name][1].patterns) == set(EVERY)


@pytest.mark.parametrize("name", ["attention", pytest.param("gated_attention", marks=pytest.mark.slow)])
def test_every_target_reads_every_token_of_its_source_and_of_no_other_segment(name):
    mixer = make_mixer(name, {}, given=GIVEN, rngs=nnx.Rngs(0))
    ids, numbers = jnp.asarray([[1, 1, 0, 7, 7]]), jnp.asarray([[1, 2, 2, 0]])
    sees = np.asarray([[1, 1, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 1, 1], [0] * 5])

    @jax.jit
    def gradients(x, y, place):
        def output(x, y):
            return mixer.cross(x, mixer.source(y, segment_ids=ids), numbers=numbers)[0, place].sum()

        return jax.grad(output, argnums=(0, 1))(x, y)

    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=(1, time, 8)), jnp.float32) for time in (4, 5))
    found = [gradients(x, y, place) for place in range(4)]
    by_target, by_source = (np.stack([np.abs(g[n][0]).sum(-1) for g in found]) for n in (0, 1))
    np.testing.assert_array_equal(by_source > 0, sees > 0)
    # Queries of a target read no other token of it.
    np.testing.assert_array_equal(by_target > 0, np.diag([True, True, True, False]))
