"""Options that published architectures need, against their equations in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf

from experiments.tasks.tokens import cross_entropy
from layers.channel.glu import ACTIVATIONS
from layers.mixers import make_mixer
from layers.norms import make_norm
from layers.positions import Rotary
from layers.positions.rotary import rotary_frequencies
from seqmodels import build_model

X = np.random.default_rng(0).standard_normal((2, 6, 8)).astype(np.float32)
IDS = jnp.arange(12).reshape(2, 6) % 11
MODEL = {"kind": "language_model", "vocab_size": 11, "width": 8, "depth": 1, "pattern": ("attention",)}
MODEL |= {"mixers": {"attention": {"heads": 2}}}


def make(**options):
    return build_model(MODEL | options, rngs=nnx.Rngs(0))


def scramble(module):
    """Gives every parameter a random value near its own."""
    keys = nnx.Rngs(1)
    for _, parameter in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        parameter.set_value(parameter[...] + 0.3 * jax.random.normal(keys(), parameter.shape))
    return module


def rms(x, epsilon=1e-6):
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + epsilon)


@pytest.mark.parametrize("residual", ["separate", "parallel"])
@pytest.mark.parametrize("position", ["pre", "output", "both"])
def test_residuals_and_places_of_norms(residual, position):
    block = make(residual=residual, norm_position=position).stack.blocks[0]
    norms = [block.mixer_norm, block.mixer_output_norm, block.channel_norm, block.channel_output_norm]
    assert [norm is not None for norm in norms] == [position != "output", position != "pre"] * 2
    for number, norm in enumerate(norms):
        if norm is not None:
            norm.scale[...] = jnp.linspace(0.5, 1.5 + number, 8)

    def branch(f, x, before, after):
        y = f(x if before is None else before(x))
        return y if after is None else after(y)

    x = jnp.asarray(X)
    mixed = branch(lambda u: block.mixer(u)[0], x, *norms[:2])
    seen = x if residual == "parallel" else x + mixed
    np.testing.assert_allclose(block(x)[0], x + mixed + branch(block.channel, seen, *norms[2:]), atol=1e-5)


def test_parallel_branches_cannot_normalize_sums():
    with pytest.raises(ValueError, match="norm_position='post' needs 'separate'"):
        make(residual="parallel", norm_position="post")


def test_embeddings_are_scaled_then_normalized():
    plain, scaled = make().embedding, make(embedding_scale=3.0).embedding
    np.testing.assert_allclose(scaled(IDS)[0], 3 * plain(IDS)[0], rtol=1e-6)
    normed = make(embedding_scale=3.0, embedding_norm=True, embedding_norm_epsilon=0.5).embedding
    x = 3 * np.asarray(plain(IDS)[0])
    centred = x - x.mean(-1, keepdims=True)
    want = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 0.5)
    np.testing.assert_allclose(normed(IDS)[0], want, atol=1e-5)
    vectors = {"kind": "classifier", "input_size": 3, "num_classes": 2, "vocab_size": None}
    with pytest.raises(ValueError, match="embedding_scale and embedding_norm are for tokens"):
        make(**vectors, embedding_scale=2.0)


def test_capped_logits_and_their_loss():
    plain, capped = make(), make(logit_cap=0.5)
    logits, want = (np.asarray(model(IDS)[0]) for model in (capped, plain))
    np.testing.assert_allclose(logits, 0.5 * np.tanh(want / 0.5), atol=1e-6)
    assert np.abs(want).max() > 0.5 > np.abs(logits).max()
    batch = {"labels": (IDS + 1) % 11, "weight": jnp.ones(2)}
    got, _ = cross_entropy(capped.unprojected(IDS)[0], batch)
    assert float(got) == pytest.approx(float(cross_entropy(jnp.asarray(logits), batch)[0]), abs=1e-6)


def test_norms_with_a_unit_offset_or_without_bias():
    offset = make_norm("rms_norm", {"unit_offset": True}, width=8, dtype=jnp.float32, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(offset(jnp.asarray(X)), rms(X), atol=1e-5)
    offset.scale[...] = jnp.arange(8.0)
    np.testing.assert_allclose(offset(jnp.asarray(X)), (1 + np.arange(8)) * rms(X), atol=1e-5)
    bare = make_norm("layer_norm", {"bias": False}, width=8, dtype=jnp.float32, rngs=nnx.Rngs(0))
    assert bare.bias is None
    np.testing.assert_allclose(bare(jnp.asarray(X)), rms(X - X.mean(-1, keepdims=True)), atol=1e-5)


@pytest.mark.parametrize("heads", ["each", "all"])
def test_norms_of_queries_and_keys(heads):
    options = {"heads": 2, "kv_heads": 1, "qk_norm": True, "norm_heads": heads, "norm_epsilon": 0.3}
    mixer = make_mixer("attention", options, given={"width": 8}, rngs=nnx.Rngs(0))
    scramble(mixer)
    q, k, v = (np.asarray(f(jnp.asarray(X))) for f in (mixer.query, mixer.key, mixer.value))
    if heads == "each":
        q, k = q.reshape(2, 6, 2, 4), k.reshape(2, 6, 1, 4)
    q, k = (
        rms(y, 0.3) * np.asarray(norm.scale[...]) for y, norm in ((q, mixer.query_norm), (k, mixer.key_norm))
    )
    got = mixer.heads(jnp.asarray(X))
    for y, want, count in zip(got, (q, k, v), (2, 1, 1), strict=True):
        np.testing.assert_allclose(y, want.reshape(2, 6, count, 4), atol=1e-5)


def test_the_output_projection_has_a_bias_of_its_own():
    for bias, output_bias in ((True, False), (False, True), (True, None)):
        options = {"heads": 2, "bias": bias, "output_bias": output_bias}
        mixer = make_mixer("attention", options, given={"width": 8}, rngs=nnx.Rngs(0))
        assert (mixer.query.bias is not None) == bias
        assert (mixer.output.bias is not None) == (bias if output_bias is None else output_bias)


def test_llama3_interpolates_in_the_number_of_turns():
    rope = Rotary(base=500.0, scaling="llama3", factor=8.0, length=256, fast=4.0, slow=1.0)
    plain, got = rotary_frequencies(16, Rotary(base=500.0)), rotary_frequencies(16, rope)
    turns = 256 * plain / (2 * np.pi)
    assert (turns > 4).sum() > 1
    assert ((turns < 4) & (turns > 1)).sum() > 0
    assert (turns < 1).sum() > 1
    for one, old, times in zip(got, plain, turns, strict=True):
        part = min(max((times - 1) / 3, 0), 1)
        assert one == pytest.approx(part * old + (1 - part) * old / 8)


def test_gelu_by_the_error_function():
    exact = 0.5 * X * (1 + erf(X / np.sqrt(2)))
    np.testing.assert_allclose(ACTIVATIONS["gelu_erf"](jnp.asarray(X)), exact, atol=1e-6)
    assert np.abs(ACTIVATIONS["gelu"](jnp.asarray(X)) - exact).max() > 1e-4
