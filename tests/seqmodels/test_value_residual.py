"""Values of the first layer in later ones, as in RWKV-7, at both ends of their share.

That a share between them is as published is a checkpoint's to show (`tests/seqmodels/interop`, rwkv7), with states and padding.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels import build_model

OPTIONS = {"head_dim": 4, "decay_rank": 3, "rate_rank": 2, "gate_rank": 5, "zero_init": False}
LATER = OPTIONS | {"value_residual": True, "value_rank": 2}
MODEL = {
    "kind": "language_model",
    "vocab_size": 11,
    "width": 8,
    "depth": 2,
    "pattern": ("first+none", "later+none"),
    "mixers": {"first": {"mixer": "rwkv7", **OPTIONS}, "later": {"mixer": "rwkv7", **LATER}},
}
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 7)))


def make(**options):
    return build_model(MODEL | options, rngs=nnx.Rngs(0))


def test_the_share_goes_from_own_values_to_those_of_the_first_layer():
    model = make()
    graph, variables = nnx.split(model)
    assert not model.stack.stacked
    plain = make(pattern=("first+none",), mixers={"first": MODEL["mixers"]["first"]}, scan=False)
    nnx.update(plain, nnx.filter_state(variables, lambda path, _: "share" not in path))

    @jax.jit
    def run(bias):
        def loss(values):
            model = nnx.merge(graph, values, copy=True)
            share = model.stack.blocks[1].mixer.share.outer
            share.kernel[...], share.bias[...] = 0 * share.kernel[...], jnp.full(8, bias)
            logits = model(IDS)[0]
            return jnp.square(logits).sum(), logits

        (_, logits), gradient = jax.value_and_grad(loss, has_aux=True)(variables)
        return logits, [gradient["stack"]["blocks"][layer]["mixer"]["value"]["kernel"] for layer in (0, 1)]

    logits, _ = run(-1e3)
    np.testing.assert_allclose(logits, jax.jit(lambda ids: plain(ids)[0])(IDS), atol=1e-5)
    other, (first, later) = run(1e3)
    assert np.abs(other - logits).max() > 1e-3
    assert jnp.abs(first[...]).max() > 1e-3
    assert not jnp.any(later[...])


def test_a_layer_without_earlier_values_is_refused():
    alone = {"pattern": ("later+none",), "mixers": {"later": MODEL["mixers"]["later"]}}
    inner = {"inner": "rwkv7", "options": LATER}
    inside = {"pattern": ("tuned_state+none",), "mixers": {"tuned_state": inner}}
    for options in (alone, inside):
        with pytest.raises(ValueError, match="value_residual=True reads the values of an earlier layer"):
            make(**options)(IDS)
