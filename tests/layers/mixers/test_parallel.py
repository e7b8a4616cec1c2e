"""Parallel mixers add what each gives alone, and refuse what cannot stand side by side."""

import numpy as np
import pytest
from flax import nnx

from layers.mixers import make_mixer
from tests.layers.mixers.literal import drawn, in_two_calls, tokens

WIDTH, TIME = 8, 12


@pytest.mark.slow
def test_is_the_sum_of_its_mixers():
    branches = {"gla": {"heads": 2}, "attention": {"heads": 2}}
    scales = {"scales": {"gla": 0.5}, "input_scales": {"attention": 2.0}}
    model, x = drawn("parallel", WIDTH, branches=branches, **scales), tokens(TIME, WIDTH)
    got, state = in_two_calls(model, x)
    np.testing.assert_allclose(got, 0.5 * model.gla(x)[0] + model.attention(2 * x)[0], atol=1e-5)
    assert set(state.carried) == set(branches)
    # Without what one branch gives, the other is left.
    model.attention.output.kernel[...] = 0 * model.attention.output.kernel[...]
    np.testing.assert_allclose(model(x)[0], 0.5 * model.gla(x)[0], atol=1e-6)


def test_mixers_that_see_the_future_do_not_stand_beside_causal_ones():
    branches = {"lru": {}, "fnet": {}}

    def make():
        return make_mixer("parallel", {"branches": branches}, given={"width": 8}, rngs=nnx.Rngs(0))

    with pytest.raises(ValueError, match="not causal .fnet. beside causal ones"):
        nnx.eval_shape(make)
