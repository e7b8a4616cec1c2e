"""The autoencoder: one vector between the sequence and its copy; and options for whatever mixer is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.positions import sinusoidal
from seqmodels import build_model

CONFIG = {
    "kind": "autoencoder",
    "width": 8,
    "depth": 2,
    "pattern": ("attention",),
    "mixer_defaults": {"heads": 2, "state_size": 4},
    "vocab_size": 7,
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 7, (2, 6)))


def build(**changes):
    return build_model(CONFIG | changes, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_logits_follow_from_one_vector_and_the_position(pooling):
    model = build(pooling=pooling, norm="layer_norm")
    ids = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    x = model.stack(model.embedding(TOKENS, segment_ids=ids)[0], segment_ids=ids)[0]
    last = jnp.stack([x[0, 5], x[1, 3]])
    vector = last if pooling == "last" else jnp.stack([x[0].mean(0), x[1, :4].mean(0)])
    y = vector[:, None] + sinusoidal(jnp.arange(6)[None], 8)
    for norm, map_ in zip(model.norms, model.maps, strict=False):
        y = jax.nn.gelu(map_(norm(y)))
    got, real = model(TOKENS, segment_ids=ids)[0], np.asarray(ids != 0)
    np.testing.assert_allclose(got[real], model.head(model.norms[2](y))[real], atol=1e-5)


def test_padding_changes_nothing():
    model = build()
    padded = jnp.pad(TOKENS, ((0, 0), (0, 3)))
    ids = (jnp.arange(9)[None] < jnp.array([[6], [6]])).astype(jnp.int32)
    np.testing.assert_allclose(model(padded, segment_ids=ids)[0][:, :6], model(TOKENS)[0], atol=1e-5)


def test_defaults_reach_the_mixers_that_have_them():
    assert build().stack.layers[0].mixer.config.heads == 2
    assert build(mixers={"attention": {"heads": 4}}).stack.layers[0].mixer.config.heads == 4
    assert build(pattern=("s5",)).stack.layers[0].mixer.config.state_size == 4
    assert build(pattern=("wersa",), mixer_defaults={"heads": 2, "causal": True}).stack.causal
    with pytest.raises(
        ValueError, match="mixer_defaults has 'width', which the model supplies to every mixer"
    ):
        build(pattern=("attention",), mixer_defaults={"width": 4, "heads": 2})


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(pooling="first"), "pooling='first'"),
        (dict(vocab_size=None, input_size=3), "an autoencoder needs vocab_size"),
        (dict(num_classes=3), "no field 'num_classes'"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_a_state_is_refused():
    with pytest.raises(ValueError, match="takes no state"):
        build()(TOKENS, state=())
