"""Hyena and its implicit filters against their equations in NumPy."""

import jax
import numpy as np
import pytest
from flax import nnx

from layers.mixers.convolution.hyena import Hyena, HyenaConfig
from tests.layers.mixers.literal import apply, stirred, wide

WIDTH, TIME = 4, 14


def make(**options):
    defaults = {"max_length": 20, "filter_features": 5, "filter_width": 8}
    return Hyena(HyenaConfig(width=WIDTH, **{**defaults, **options}), rngs=nnx.Rngs(1))


def inputs(time=TIME):
    return jax.random.normal(jax.random.key(0), (2, time, WIDTH))


def literal_filters(model):
    """k (l, d, p - 1), from positions written as complex exponentials."""
    config, network = model.config, model.filter
    length, count = config.max_length, (config.filter_features - 1) // 2
    share = np.linspace(0, 1, length)[:, None]
    turn = 2 * np.pi * np.arange(length)[:, None] / length
    waves = np.exp(-1j * np.linspace(1e-4, count - 1, count) * turn)
    h = np.concatenate([share, waves.real, waves.imag], axis=1)
    for layer in range(3):
        h = np.sin(wide(network.frequency) * (h @ wide(network.weights[layer]) + wide(network.biases[layer])))
    h = h @ wide(network.weights[3])
    rates = np.linspace(np.log(100) / 1.5, np.log(100) / 0.3, h.shape[1])
    taps = h * (np.exp(-share * rates) + config.window_shift)
    if config.frequencies is not None:
        kept = np.arange(1 - config.frequencies, config.frequencies)
        waves = np.exp(2j * np.pi * np.outer(np.arange(length), kept) / (2 * length))
        taps = (waves @ (waves.conj().T @ taps)).real / (2 * length)
    return taps[: config.partial].reshape(-1, WIDTH, config.order - 1)


def literal(model, x):
    filters, outputs = literal_filters(model), []
    for row in np.asarray(x, np.float64):
        projected = apply(model.input, row)
        weight, taps = wide(model.convolution.weight), model.config.taps
        padded = np.concatenate([np.zeros((taps - 1, projected.shape[1])), projected])
        mixed = sum(weight[j] * padded[j : j + len(row)] for j in range(taps)) + wide(model.convolution.bias)
        *gates, v = np.split(mixed, model.config.order + 1, axis=1)
        for i in range(model.config.order - 1):
            u = gates[model.config.order - 1 - i] * v
            v = wide(model.beta)[i] * u
            for t in range(len(row)):
                for lag in range(min(t + 1, len(filters))):
                    v[t] += filters[lag, :, i] * u[t - lag]
        outputs.append(apply(model.output, gates[0] * v))
    return np.stack(outputs)


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"order": 3, "window_shift": 0.05},
        {"max_length": 6, "filter_features": 3},
        {"order": 4, "taps": 4},
        {"order": 3, "partial": 5, "frequencies": 4},
    ],
)
def test_equals_the_equation(options):
    model = stirred(make(**options))
    want = literal(model, inputs())
    np.testing.assert_allclose(model(inputs())[0], want, atol=2e-5 * np.abs(want).max())
    np.testing.assert_allclose(model(inputs(), model.init_state(2))[0], want, atol=2e-5 * np.abs(want).max())


def test_a_shorter_filter_is_the_beginning_of_the_longer_one():
    network = make().filter
    np.testing.assert_allclose(network(7), network(20)[:, :7], atol=1e-6)


def test_initial_filters_decay_within_their_window():
    model = make(max_length=400, filter_width=64, filter_features=33)
    np.testing.assert_array_equal(wide(model.filter.frequency), 14.0)
    taps = np.abs(wide(model.filter(400)))
    # The fastest channel is down to 1% after 0.3 of the length, the slowest one to 4.6% at its end.
    assert taps[-1, 120:].max() <= 0.0101 * np.abs(wide(model.filter.weights[3])).sum(0)[-1]
    assert taps[0, 380:].max() > 1e-4
    np.testing.assert_allclose([wide(weight).std() for weight in model.filter.weights], 0.02, rtol=0.2)
    assert all(np.all(wide(bias) == 0) for bias in model.filter.biases)


@pytest.mark.slow
def test_gradients_of_the_filters_are_not_those_of_14_cubed():
    """At the sizes and frequency of the paper, the first layer of the network learns about as fast as the rest."""
    model = Hyena(HyenaConfig(width=16, max_length=64), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 64, 16))
    gradient = nnx.grad(lambda model: (model(x)[0] ** 2).mean())(model)
    first, rest = (
        np.linalg.norm(g) for g in (gradient["filter"]["weights"][0][...], gradient["output"]["kernel"][...])
    )
    assert 0.01 * rest < first < 30 * rest


def test_a_small_state_gives_nan_beyond_it_and_the_rest_right():
    model = make(order=3)
    want, _ = model(inputs())
    got, _ = model(inputs(), model.init_state(2, max_length=9))
    np.testing.assert_allclose(got[:, :9], want[:, :9], atol=2e-6)
    assert np.isnan(got[:, 9:]).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"order": 1}, "order=1.*at least 2"),
        ({"filter_features": 4}, "filter_features=4.*odd"),
        ({"max_length": 0}, "max_length=0"),
        ({"taps": 9}, "taps=9"),
        ({"partial": 21}, "partial=21; expected 1 to 20"),
        ({"frequencies": 22}, "frequencies=22; expected 1 to 21"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
