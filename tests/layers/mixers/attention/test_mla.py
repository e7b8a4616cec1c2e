"""Latent attention: its equation in NumPy, the absorbed form, and the size of its cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.mixers.attention.mla import MLA, MLAConfig
from layers.positions.rotary import rotary_frequencies

WIDTH, TIME = 8, 9
SIZES = {"heads": 3, "latent": 6, "head_dim": 4, "rope_dim": 2, "value_dim": 5}
X = jax.random.normal(jax.random.key(0), (2, TIME, WIDTH))


def make(**options):
    return MLA(MLAConfig(width=WIDTH, **SIZES | options), rngs=nnx.Rngs(0))


def literal(model, x):
    """One row in float64; the one turned pair as a complex number."""
    x, position = np.asarray(x, np.float64), model.config.position

    def apply(name, y):
        return y @ np.asarray(getattr(model, name).kernel[...], np.float64)

    def norm(y):
        return y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6)

    def turn(y):
        if not hasattr(position, "base"):
            return y
        pair = (y[..., 0] + 1j * y[..., 1]) * np.exp(1j * np.arange(len(x)) * rotary_frequencies(2, position))
        return np.stack([pair.real, pair.imag], -1)

    latents = apply("latent", x)
    c, k_turned = norm(latents[:, :6]), turn(latents[:, 6:])
    q = apply("query", x if model.query_down is None else norm(apply("query_down", x)))
    kv = apply("expand", c)
    gain = 0.1 * np.log(position.factor) + 1 if getattr(position, "scaling", "") == "yarn" else 1
    heads = []
    for head in range(3):
        qh, kvh = q[:, 6 * head : 6 * head + 6], kv[:, 9 * head : 9 * head + 9]
        logits = (qh[:, :4] @ kvh[:, :4].T + turn(qh[:, 4:]) @ k_turned.T) / np.sqrt(6) * gain**2
        weights = np.exp(logits) * np.tril(np.ones_like(logits))
        heads.append(weights / weights.sum(1, keepdims=True) @ kvh[:, 4:])
    o = np.concatenate(heads, 1)
    return apply("output", o if model.gate is None else o / (1 + np.exp(-apply("gate", x))))


YARN = {"name": "rope", "scaling": "yarn", "factor": 8.0, "length": 4}


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "options",
    [
        {"query_latent": 5, "gate": True},
        {"query_latent": 5},
        {"position": "none", "gate": True},
        {"position": YARN, "absorbed": True},
        {},
    ],
)
def test_equals_the_equation(options):
    model = make(**options)
    for row, got in zip(X, model(X)[0], strict=True):
        np.testing.assert_allclose(got, literal(model, row), atol=2e-6)


@pytest.mark.slow
def test_absorbed_decoding_equals_expanded_prefill():
    plain, absorbed, chosen = (make(absorbed=how) for how in (False, True, None))
    want, _ = plain(X)
    for model in (plain, absorbed, chosen):
        state = model.init_state(2, max_length=TIME)
        first, state = model(X[:, :6], state)
        outputs = [first]
        for t in range(6, TIME):
            y, state = model(X[:, t : t + 1], state)
            outputs.append(y)
        np.testing.assert_allclose(jnp.concatenate(outputs, 1), want, atol=5e-6)


def test_one_token_is_absorbed_and_a_long_call_is_not():
    model = MLA(MLAConfig(width=WIDTH, heads=2), rngs=nnx.Rngs(0))
    assert model._absorbs(1, 4096, cached=True)
    assert not model._absorbs(4096, 4096, cached=True)
    assert not model._absorbs(1, 1, cached=False)


@pytest.mark.slow
def test_the_cache_holds_latent_and_turned_numbers_alone():
    state = make().init_state(2, max_length=TIME)
    assert sum(x.size for x in state.carried.entries) == 2 * TIME * (6 + 2)
    y, _ = make()(X, make().init_state(2, max_length=7))
    assert np.isnan(y[:, 7:]).all()
    assert np.isfinite(y[:, :7]).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"position": "alibi"}, "takes 'rope' or 'none'"),
        ({"rope_dim": 3}, "rope_dim=3: .*even"),
        ({"latent": 0}, "latent=0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
    with pytest.raises(ValueError, match="max_length=None, but the cache of mla holds all tokens"):
        make().init_state(1)
