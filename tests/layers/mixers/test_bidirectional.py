"""Bidirectional mixers: what they compute, what the directions share, and reversal within segments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from layers.mixers import make_mixer
from layers.parts.each_segment import reverse_segments
from seqmodels import build_model

WIDTH, TIME = 4, 9
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, TIME, WIDTH)), jnp.float32)
MAMBA = {"inner": "mamba", "options": {"state_size": 3}}


def make(**options):
    return make_mixer("bidirectional", options, given={"width": WIDTH}, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("tied", [False, True, "projections"])
@pytest.mark.parametrize("combine", ["sum", "concatenate"])
def test_is_the_mixer_from_both_ends(tied, combine):
    model = make(**MAMBA, tied=tied, combine=combine)
    backward = model.forward if tied is True else model.backward
    one, other = model.forward(X)[0], backward(X[:, ::-1])[0][:, ::-1]
    want = one + other if combine == "sum" else model.joined(jnp.concatenate([one, other], -1))
    np.testing.assert_allclose(model(X)[0], want, atol=1e-6)
    assert not np.allclose(one, other)


def test_swapping_the_directions_of_reversed_input_reverses_the_output():
    model = make(**MAMBA)
    straight, _ = model(X)
    model.forward, model.backward = model.backward, model.forward
    np.testing.assert_allclose(model(X[:, ::-1])[0][:, ::-1], straight, atol=1e-6)


def count(model):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_what_is_tied_is_stored_once():
    one = make_mixer("mamba", {"state_size": 3}, given={"width": WIDTH}, rngs=nnx.Rngs(0))
    shared = sum(count(part) for part in (one.input, one.output))
    assert count(make(**MAMBA)) == 2 * count(one)
    assert count(make(**MAMBA, tied=True)) == count(one)
    assert count(make(**MAMBA, tied="projections")) == 2 * count(one) - shared


@pytest.mark.slow
def test_the_gradient_of_a_shared_matrix_is_the_sum_of_both_uses():
    def gradient(model):
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.cos(nnx.merge(graph, p, rest, copy=True)(X)[0]))))(
            params
        )

    tied, free = make(**MAMBA, tied="projections"), make(**MAMBA)
    for name in ("input", "output"):
        getattr(free.backward, name).kernel[...] = getattr(free.forward, name).kernel[...]
    nnx.update(tied.backward, jax.tree.map(jnp.copy, nnx.state(free.backward)))
    nnx.update(tied.forward, jax.tree.map(jnp.copy, nnx.state(free.forward)))
    both, apart = gradient(tied), gradient(free)
    shared = [
        both[side][name]["kernel"] for side in both for name in ("input", "output") if name in both[side]
    ]
    assert len(shared) == 2
    for got, name in zip(shared, ("input", "output"), strict=True):
        want = sum(apart[side][name]["kernel"][...] for side in ("forward", "backward"))
        np.testing.assert_allclose(got[...], want, atol=1e-5)


@pytest.mark.slow
def test_a_model_may_hold_shared_matrices():
    config = dict(
        kind="classifier", width=WIDTH, depth=2, pattern=("bidirectional",), vocab_size=5, num_classes=2
    )
    config |= dict(mixers={"bidirectional": MAMBA | {"tied": "projections"}}, channel="none")
    model = build_model(config, rngs=nnx.Rngs(0))
    straight = build_model(config | {"scan": False}, rngs=nnx.Rngs(0))
    tokens = jnp.asarray([[1, 2, 3, 4, 2]])
    np.testing.assert_allclose(model(tokens)[0], straight(tokens)[0], atol=1e-6)


@given(ids=st.lists(st.integers(0, 3), min_size=12, max_size=12))
def test_reversal_stays_in_segments_and_leaves_padding(ids):
    tokens = np.arange(12.0)
    want, before, run = tokens.copy(), None, []
    runs = []
    for index in np.flatnonzero(ids):
        if ids[index] != before:
            runs.append([])
        runs[-1].append(index)
        before = ids[index]
    for run in runs:
        want[run] = tokens[run[::-1]]
    got = reverse_segments(jnp.asarray(tokens, jnp.float32)[None, :, None], jnp.asarray([ids]))
    np.testing.assert_array_equal(got[0, :, 0], want)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"inner": "mamba", "combine": "product"}, "combine='product'"),
        ({"inner": "mamba", "tied": "all"}, "tied='all'"),
        ({"inner": "mambo"}, "did you mean 'mamba'"),
        ({"inner": "mamba", "options": {"colour": 1}}, "no option 'colour'"),
        ({"inner": "fnet"}, "inner='fnet' is not causal"),
        ({"inner": "s5", "tied": "projections"}, "inner='s5' has no input"),
        ({}, "needs the option inner"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
