"""Options that published architectures need, against their equations in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf

from experiments.tasks.tokens import cross_entropy
from layers.channel import make_channel_mixer
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


@pytest.mark.parametrize("position", ["post", "stream"])
def test_parallel_branches_cannot_normalize_sums(position):
    with pytest.raises(ValueError, match=f"norm_position='{position}' needs 'separate'"):
        make(residual="parallel", norm_position=position)


def test_a_stream_of_normalized_values():
    block = scramble(make(norm_position="stream", residual_scale=2.0, branch_scale=0.5).stack.blocks[0])
    x = jnp.asarray(X)
    seen = block.mixer_norm(x)
    seen = block.channel_norm(2 * seen + 0.5 * block.mixer(seen)[0])
    np.testing.assert_allclose(block(x)[0], 2 * seen + 0.5 * block.channel(seen), atol=1e-5)


def test_branches_and_logits_have_factors():
    block = make(branch_scale=0.5, residual_scale=2.0).stack.blocks[0]
    x = jnp.asarray(X)
    seen = 2 * x + 0.5 * block.mixer(block.mixer_norm(x))[0]
    want = 2 * seen + 0.5 * block.channel(block.channel_norm(seen))
    np.testing.assert_allclose(block(x)[0], want, atol=1e-5)
    plain, scaled = make(), make(logit_scale=0.25, logit_cap=0.1)
    logits = np.asarray(plain(IDS)[0])
    np.testing.assert_allclose(scaled(IDS)[0], 0.1 * np.tanh(0.25 * logits / 0.1), atol=1e-6)


def test_parallel_branches_share_a_norm():
    block = make(residual="parallel", shared_norm=True, norm_position="both").stack.blocks[0]
    assert block.channel_norm is None
    scramble(block)
    x = jnp.asarray(X)
    u = block.mixer_norm(x)
    mixed = block.mixer_output_norm(block.mixer(u)[0])
    want = x + mixed + block.channel_output_norm(block.channel(u))
    np.testing.assert_allclose(block(x)[0], want, atol=1e-5)
    for options in ({}, {"residual": "parallel", "norm_position": "output"}):
        with pytest.raises(ValueError, match="shared_norm=True with residual="):
            make(shared_norm=True, **options)


@pytest.mark.parametrize("compute", ["dense", "grouped"])
def test_experts_with_biases_and_bounds(compute):
    options = {"experts": 4, "top_k": 2, "hidden": 5, "compute": compute}
    options |= {"bias": True, "gain": 1.7, "clamp": 0.6, "offset": 1.0}
    moe = scramble(make_channel_mixer("moe", options, given={"width": 8}, rngs=nnx.Rngs(0)))
    names = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
    own = {name: np.asarray(getattr(moe, name)[...]) for name in names}
    logits = X @ np.asarray(moe.router.kernel[...]) + np.asarray(moe.router.bias[...])
    want = np.zeros_like(X)
    for place in np.ndindex(2, 6):
        best = np.argsort(-logits[place])[:2]
        weights = np.exp(logits[place][best])
        for expert, weight in zip(best, weights / weights.sum(), strict=True):
            gate, up = (X[place] @ own[n][expert] + own[f"{n}_bias"][expert] for n in ("gate", "up"))
            gate, up = np.minimum(gate, 0.6), np.clip(up, -0.6, 0.6)
            hidden = gate / (1 + np.exp(-1.7 * gate)) * (up + 1)
            want[place] += weight * (hidden @ own["down"][expert] + own["down_bias"][expert])
    np.testing.assert_allclose(moe(jnp.asarray(X)), want, atol=1e-5)


def test_units_and_keys_have_factors():
    x, swish = jnp.asarray(X), {"hidden": 5, "scale": 0.5, "gate_scale": 1.5}
    unit = make_channel_mixer("swiglu", swish, given={"width": 8}, rngs=nnx.Rngs(0))
    gate = 1.5 * np.asarray(unit.gate(x))
    want = 0.5 * np.asarray(unit.down(jnp.asarray(gate / (1 + np.exp(-gate)) * np.asarray(unit.up(x)))))
    np.testing.assert_allclose(unit(x), want, atol=1e-5)
    options = {"heads": 2, "key_scale": 1.5, "bias": True}
    attention = scramble(make_mixer("attention", options, given={"width": 8}, rngs=nnx.Rngs(0)))
    _, scaled, _ = attention.heads(x)
    np.testing.assert_allclose(scaled, 1.5 * attention.key(x).reshape(2, 6, 2, 4), atol=1e-6)


@pytest.mark.parametrize("compute", [pytest.param("dense", marks=pytest.mark.slow), "grouped"])
def test_experts_without_gates(compute):
    options = {"experts": 4, "top_k": 2, "hidden": 5, "shared": 1, "compute": compute, "bias": True}
    options |= {"gated": False, "activation": "relu2"}
    moe = scramble(make_channel_mixer("moe", options, given={"width": 8}, rngs=nnx.Rngs(0)))
    names = ("up", "down", "up_bias", "down_bias")
    own = {name: np.asarray(getattr(moe, name)[...]) for name in names}
    logits = X @ np.asarray(moe.router.kernel[...]) + np.asarray(moe.router.bias[...])
    shared = np.maximum(X @ np.asarray(moe.shared.up.kernel[...]), 0) ** 2
    want = shared @ np.asarray(moe.shared.down.kernel[...])
    for place in np.ndindex(2, 6):
        best = np.argsort(-logits[place])[:2]
        weights = np.exp(logits[place][best])
        for expert, weight in zip(best, weights / weights.sum(), strict=True):
            hidden = np.maximum(X[place] @ own["up"][expert] + own["up_bias"][expert], 0) ** 2
            want[place] += weight * (hidden @ own["down"][expert] + own["down_bias"][expert])
    np.testing.assert_allclose(jax.jit(moe)(jnp.asarray(X)), want, atol=1e-5)


def test_embeddings_are_scaled_then_normalized():
    plain, scaled = make().embedding, make(embedding_scale=3.0).embedding
    np.testing.assert_allclose(scaled(IDS)[0], 3 * plain(IDS)[0], rtol=1e-6)
    normed = make(embedding_scale=3.0, embedding_norm=True, embedding_norm_epsilon=0.5).embedding
    x = 3 * np.asarray(plain(IDS)[0])
    centred = x - x.mean(-1, keepdims=True)
    want = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 0.5)
    np.testing.assert_allclose(normed(IDS)[0], want, atol=1e-5)
    vectors = {"kind": "classifier", "input_size": 3, "num_classes": 2, "vocab_size": None}
    with pytest.raises(
        ValueError, match="embedding_scale, embedding_norm, embedding_map and token_types are for tokens"
    ):
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


def test_longrope_divides_each_pair_by_its_own_number():
    plain = rotary_frequencies(8, Rotary(base=500.0))
    divisors = (1.0, 2.0, 3.5, 8.0)
    got = rotary_frequencies(8, Rotary(base=500.0, scaling="longrope", divisors=divisors))
    np.testing.assert_allclose(got, plain / np.array(divisors))
    for options in ({"divisors": divisors}, {"scaling": "longrope"}):
        with pytest.raises(ValueError, match="longrope needs one per pair"):
            Rotary(**options)
    with pytest.raises(ValueError, match="divisors has 4 numbers; expected 2, one per pair"):
        make_mixer(
            "attention",
            {"heads": 2, "position": {"name": "rope", "scaling": "longrope", "divisors": divisors}},
            given={"width": 8},
            rngs=nnx.Rngs(0),
        )


def test_yarn_without_rounded_bounds():
    rope = Rotary(base=500.0, scaling="yarn", factor=4.0, length=64, rounded=False)
    plain, got = rotary_frequencies(16, Rotary(base=500.0)), rotary_frequencies(16, rope)
    low, high = (16 * np.log(64 / (2 * np.pi * turns)) / (2 * np.log(500)) for turns in (32, 1))
    assert low < 0
    assert high % 1 > 0.1
    divided = np.clip(np.arange(8) / high, 0, 1)
    np.testing.assert_allclose(got, plain * (1 - divided) + plain / 4 * divided)
    with pytest.raises(ValueError, match="only yarn has bounds to round"):
        Rotary(rounded=False)


def test_gelu_by_the_error_function():
    exact = 0.5 * X * (1 + erf(X / np.sqrt(2)))
    np.testing.assert_allclose(ACTIVATIONS["gelu_erf"](jnp.asarray(X)), exact, atol=1e-6)
    assert np.abs(ACTIVATIONS["gelu"](jnp.asarray(X)) - exact).max() > 1e-4
