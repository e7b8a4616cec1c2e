"""A tuned state is the state that the inner mixer is given, in every segment; and what has none is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.mixers import make_mixer
from layers.parameters import group_of
from tests.layers.mixers.literal import drawn, tokens

WIDTH, TIME = 8, 12
INNER = {"gla": {"heads": 2, "taps": 2}, "s5": {"state_size": 4}}


def test_is_the_inner_mixer_from_that_state_in_whole_rows():
    model, x = drawn("tuned_state", WIDTH, inner="s5", options=INNER["s5"]), tokens(TIME, WIDTH)

    @jax.jit
    def run(x):
        given = model.inner.init_state(2)._replace(carried=model.initial(2, None))
        return model(x)[0], model.inner(x, given)[0], model.inner(x)[0]

    got, want, untuned = run(x)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(got - untuned).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", INNER)
def test_is_the_inner_mixer_from_that_state_in_every_segment(name):
    model, x = drawn("tuned_state", WIDTH, inner=name, options=INNER[name]), tokens(TIME, WIDTH)
    ids = jnp.asarray([[1] * 7 + [0] + [2] * 4, [3] * 12])

    @jax.jit
    def run(x, ids):
        """The mixer, with a state, without, and cut inside a segment; and the inner one from the tuned state on each."""
        state = model.init_state(2)
        carried = model.inner.init_state(2)._replace(carried=model.initial(2, None))
        alone = [model.inner(part, carried)[0] for part in (x[:, :7], x[:, 8:], x)]
        begun, after = model(x[:, :10], state, segment_ids=ids[:, :10])
        ended, _ = model(x[:, 10:], after, segment_ids=ids[:, 10:])
        cut = jnp.concatenate([begun, ended], axis=1)
        return model(x, state, segment_ids=ids)[0], model(x, segment_ids=ids)[0], cut, alone

    *results, (first, second, whole) = run(x, ids)
    for got in results:
        np.testing.assert_allclose(got[0, :7], first[0], atol=1e-5)
        np.testing.assert_allclose(got[0, 8:], second[0], atol=1e-5)
        np.testing.assert_allclose(got[1], whole[1], atol=1e-5)


def test_its_parameters_have_a_group_of_their_own():
    model = drawn("tuned_state", WIDTH, inner="gla", options=INNER["gla"])
    groups = {path[0]: group_of(v) for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert groups.pop("start") == "no_decay/start"
    assert set(groups) == {"inner"}


@pytest.mark.parametrize("inner", ["attention", "fnet", "retnet"])
def test_mixers_without_a_recurrent_state_are_refused(inner):
    def make():
        options = {} if inner == "fnet" else {"heads": 2}
        make_mixer("tuned_state", {"inner": inner, "options": options}, given={"width": 8}, rngs=nnx.Rngs(0))

    with pytest.raises(ValueError, match=f"inner='{inner}'.*has no recurrent state to train"):
        nnx.eval_shape(make)
