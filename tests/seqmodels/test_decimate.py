"""DeciMamba: prompts of which layers drop tokens, against the definition in NumPy, and what goes on after them."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels import DecimateConfig, build_model, decimate
from tests.layers.mixers.literal import apply, filled, filtered, rms, silu, softplus, wide

TOKENS = np.random.default_rng(0).integers(0, 7, (2, 14))
MODEL = dict(
    kind="language_model",
    vocab_size=7,
    width=4,
    depth=3,
    pattern=("mamba+none",),
    mixers={"mamba": dict(state_size=3, dt_rank=2)},
)


@pytest.fixture(scope="module")
def model():
    return filled(lambda: build_model(MODEL, rngs=nnx.Rngs(0)))


def layer(mixer, x, keep):
    """Outputs of a row whose scan reads the tokens that `keep` chooses by the step sizes, and their places."""
    channels, rank, size = mixer.config.channels, 2, 3
    u, gate = np.split(apply(mixer.input, x), [channels], axis=1)
    u = silu(filtered(u, wide(mixer.convolution.weight)) + wide(mixer.convolution.bias))
    r, b, c = np.split(apply(mixer.selection, u), [rank, rank + size], axis=1)
    dt = softplus(r @ wide(mixer.dt.kernel) + wide(mixer.dt_bias))
    places = keep(dt)
    h, y = np.zeros((channels, size)), []
    for t in places:
        h = np.exp(-dt[t][:, None] * np.exp(wide(mixer.log_a))) * h + np.outer(dt[t] * u[t], b[t])
        y.append((h @ c[t] + wide(mixer.d) * u[t]) * silu(gate[t]))
    return apply(mixer.output, np.array(y)), places


def written(model, tokens, counts, last):
    """Logits and places of one prompt, given how many tokens each layer keeps; None for all."""
    x, places = wide(model.embedding.table)[tokens], np.arange(len(tokens))
    for block, count in zip(model.stack.layers, counts, strict=True):

        def keep(dt, count=count):
            if count is None:
                return range(len(dt))
            free = len(dt) - last
            best = sorted(range(free), key=lambda t: -np.sqrt((dt[t] ** 2).sum()))[: count - last]
            return [*sorted(best), *range(free, len(dt))]

        y, kept = layer(
            block.mixer, rms(x, block.mixer_norm.config.epsilon) * wide(block.mixer_norm.scale), keep
        )
        x, places = x[list(kept)] + y, places[list(kept)]
    h = rms(x, model.norm.config.epsilon) * wide(model.norm.scale)
    return h @ wide(model.embedding.table).T, places


@pytest.mark.slow
@pytest.mark.parametrize("last", [0, 2])
def test_layers_keep_tokens_of_large_steps(model, last):
    """The second layer 8 of 14, the third half as many, and the last ones besides."""
    found = decimate(model, TOKENS, DecimateConfig(layers=(1, 2), length=8, least=1, last=last))
    for row, tokens in enumerate(TOKENS):
        want, places = written(model, tokens, [None, 8 + last, 4 + last], last)
        assert found.places[row].tolist() == places.tolist()
        np.testing.assert_allclose(found.logits[row], want, atol=2e-5)


@pytest.mark.slow
def test_prompts_within_the_length_are_whole_and_states_go_on(model):
    config = DecimateConfig(layers=(0, 2), length=20, factor=1.0)
    found = decimate(model, TOKENS, config)
    state = model.init_state(2)
    whole, state = model(jnp.asarray(TOKENS), state)
    np.testing.assert_allclose(found.logits, whole, atol=2e-5)
    more = jnp.asarray(TOKENS[:, :3])
    np.testing.assert_allclose(model(more, found.state)[0], model(more, state)[0], atol=2e-5)
    short = decimate(model, TOKENS, DecimateConfig(layers=(1,), length=5, least=1))
    assert short.places.shape == (2, 5)
    assert model(more, short.state)[0].shape == (2, 3, 7)


def test_how_many_tokens_remain():
    """At least 20 of those that are there, as in the authors' code, and those at the end besides."""
    config = DecimateConfig(layers=(3, 7, 9), length=100)
    assert [config.kept(s, 400) for s in range(3)] == [100, 50, 25]
    assert [config.kept(s, 30) for s in range(3)] == [30, 30, 25]
    assert config.kept(4, 400) == 20
    assert config.kept(4, 7) == 7
    assert DecimateConfig(layers=(3,), length=100, last=10).kept(0, 400) == 110
