"""LongMamba: bounds of step sizes against the definition in NumPy, and what heads that skip tokens give."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels import LengthenConfig, build_model, lengthen
from seqmodels.lengthen import bounds_of
from tests.layers.mixers.literal import rms, silu, softplus, wide

TIME, LONG, HEADS = 10, 26, 4
TOKENS = np.random.default_rng(0).integers(0, 7, (3, TIME))
CONFIG = {
    "kind": "language_model",
    "vocab_size": 7,
    "width": 8,
    "depth": 2,
    "pattern": ("mamba2+none",),
    # Some heads forget within a row.
    "mixers": {"mamba2": {"head_dim": 4, "state_size": 3, "a_min": 0.5, "a_max": 60.0, "dt_min": 0.01}},
}


def build(**changes):
    return build_model(CONFIG | changes, rngs=nnx.Rngs(0))


def written(steps, rate, options):
    """The bound of one head from the step sizes (t) of each row."""
    decays, bounds = [], []
    for row in steps:
        row = np.minimum(row, sorted(row)[-max(1, int(TIME * options.clamp))])
        decays.append(np.exp(-rate * row.sum()))
        ordered = np.array(sorted(row, reverse=True))
        places = np.clip((np.arange(options.length) + 0.5) * TIME / options.length - 0.5, 0, TIME - 1)
        longer = np.interp(places, np.arange(TIME), ordered)
        number = next(n for n in range(len(longer)) if longer[: n + 1].sum() > row.sum())
        bounds.append(longer[number + 1])
    return options.factor * np.mean(bounds) if np.mean(decays) > options.decay else -np.inf


def mamba2(mixer, x, bounds):
    """One row (t, d), token by token; heads skip tokens whose steps are not above their bounds."""
    channels, size = mixer.config.channels, mixer.config.state_size
    z, mixed, dt = np.split(x @ wide(mixer.input.kernel), [channels, 2 * channels + 2 * size], axis=1)
    taps, padded = wide(mixer.convolution.weight), np.pad(mixed, ((3, 0), (0, 0)))
    mixed = silu(sum(padded[j : j + len(x)] * taps[j] for j in range(4)) + wide(mixer.convolution.bias))
    u, key, query = np.split(mixed, [channels, channels + size], axis=1)
    dt = softplus(dt + wide(mixer.dt_bias))
    state, y = np.zeros((HEADS, size, 4)), np.zeros((len(x), HEADS, 4))
    for t in range(len(x)):
        for h, value in enumerate(u[t].reshape(HEADS, 4)):
            if dt[t, h] > bounds[h]:
                decay = np.exp(-dt[t, h] * np.exp(wide(mixer.log_a)[h]))
                state[h] = decay * state[h] + np.outer(key[t], dt[t, h] * value)
            y[t, h] = query[t] @ state[h] + wide(mixer.d)[h] * value
    y = rms(y.reshape(len(x), channels) * silu(z), mixer.config.epsilon) * wide(mixer.scale)
    return dt, y @ wide(mixer.output.kernel)


def test_bounds_of_given_steps():
    options, rates = LengthenConfig(length=LONG, clamp=0.2, factor=1.1), np.array([0.5, 2.0, 9.0])
    steps = np.random.default_rng(0).gamma(0.5, 0.2, (4, TIME, 3))
    want = [written(steps[:, :, h], rates[h], options) for h in range(3)]
    assert np.isinf(want).tolist() == [False, False, True]
    np.testing.assert_allclose(bounds_of(steps, rates, options), want, rtol=1e-12)


@pytest.mark.slow
def test_bounds_and_outputs_against_the_definition():
    model, options = build(), LengthenConfig(length=LONG, clamp=0.2, factor=1.1)
    found = lengthen(model, TOKENS, options)
    x = wide(model.embedding.table)[TOKENS]
    for layer in range(2):
        block = model.stack.block(layer)  # the copy of a stacked layer, with its bounds
        norm = [rms(row, block.mixer_norm.config.epsilon) * wide(block.mixer_norm.scale) for row in x]
        dt, y = zip(*(mamba2(block.mixer, row, np.full(HEADS, -1.0)) for row in norm), strict=True)
        rates = np.exp(wide(block.mixer.log_a))
        want = [written([row[:, h] for row in dt], rates[h], options) for h in range(HEADS)]
        np.testing.assert_allclose(found[layer], want, rtol=1e-5)
        x = x + np.stack(y)
    assert 0 < np.isinf(np.concatenate(list(found.values()))).sum() < 2 * HEADS
    rows = np.random.default_rng(1).standard_normal((1, LONG, 8))
    dt, y = mamba2(block.mixer, rows[0], found[1])
    assert 0 < (dt <= found[1]).sum() < (dt <= found[1]).size
    np.testing.assert_allclose(block.mixer(jnp.asarray(rows, jnp.float32))[0][0], y, atol=1e-5)


@pytest.mark.slow
def test_rows_of_training_pass_and_stacked_layers_are_like_others():
    model, alone = build(), build(scan=False)
    plain = model(jnp.asarray(TOKENS))[0]
    bounds = lengthen(model, TOKENS, LengthenConfig(length=TIME))
    assert all(np.isinf(each).all() for each in bounds.values())
    np.testing.assert_array_equal(model(jnp.asarray(TOKENS))[0], plain)
    for each in (model, alone):
        lengthen(each, TOKENS, LengthenConfig(length=LONG))
    long = jnp.asarray(np.random.default_rng(2).integers(0, 7, (2, LONG)))
    filtered, other = model(long)[0], alone(long)[0]
    np.testing.assert_allclose(filtered, other, atol=1e-5)
    state, steps = alone.init_state(2), []
    for cut in np.split(np.asarray(long), [9, 10], axis=1):
        y, state = alone(jnp.asarray(cut), state)
        steps.append(y)
    np.testing.assert_allclose(jnp.concatenate(steps, 1), other, atol=1e-5)
    lengthen(model, TOKENS, LengthenConfig(length=TIME))
    assert np.abs(filtered - model(long)[0]).max() > 1e-4
