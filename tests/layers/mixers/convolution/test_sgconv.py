"""SGConv against its equation in NumPy, with the kernel put together tap by tap."""

import jax
import numpy as np
import pytest
from flax import nnx

from layers.mixers.convolution.sgconv import SGConv, SGConvConfig
from tests.layers.mixers.literal import wide

WIDTH, TIME = 3, 26


def make(**options):
    return SGConv(
        SGConvConfig(width=WIDTH, **{"max_length": 30, "kernel_size": 4, **options}), rngs=nnx.Rngs(1)
    )


def inputs(time=TIME):
    return jax.random.normal(jax.random.key(0), (2, time, WIDTH))


def literal_kernel(model):
    """Kernels (f, d, L); tap j of a piece stretched r times lies at (j + 1/2) / r - 1/2 of its parameters."""
    config = model.config
    decay = np.linspace(config.decay_min, config.decay_max, config.width)
    kernels = []
    for which in range(2 if config.bidirectional else 1):
        channels = []
        for channel in range(config.width):
            taps = []
            for scale in range(config.scales):
                w, stretch = wide(model.w)[scale, which, channel], 2 ** max(0, scale - 1)
                places = (np.arange(config.kernel_size * stretch) + 0.5) / stretch - 0.5
                values = np.interp(places, np.arange(config.kernel_size), w)
                taps.extend(values * decay[channel] ** (config.scales - 1 - scale))
            channels.append(taps)
        kernels.append(channels)
    return np.array(kernels)


def literal(model, x):
    kernel = (literal_kernel(model) / wide(model.norm))[..., : model.config.max_length]
    x = np.asarray(x, np.float64)
    y = wide(model.d) * x
    for t in range(x.shape[1]):
        for s in range(x.shape[1]):
            if 0 <= t - s < kernel.shape[2]:
                y[:, t] += kernel[0, :, t - s] * x[:, s]
            elif t < s <= t + kernel.shape[2] and model.config.bidirectional:
                y[:, t] += kernel[1, :, s - t - 1] * x[:, s]
    return y


@pytest.mark.sample(5)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_length": 4},
        {"max_length": 9, "decay_max": 4.0},
        {"bidirectional": True},
        {"max_length": 3, "bidirectional": True},
    ],
)
def test_equals_the_equation(options):
    model = make(**options)
    want = literal(model, inputs())
    np.testing.assert_allclose(model(inputs())[0], want, atol=5e-6)
    if model.causal:
        np.testing.assert_allclose(model(inputs(), model.init_state(2))[0], want, atol=5e-6)


def test_kernels_start_with_norm_one_and_the_norm_stays():
    model = make(max_length=32, bidirectional=True)
    np.testing.assert_allclose(np.linalg.norm(model.kernel(), axis=-1), 1.0, rtol=1e-5)
    model.w[...] = 3 * model.w[...]
    np.testing.assert_allclose(np.linalg.norm(model.kernel(), axis=-1), 3.0, rtol=1e-5)


def test_scales_double_in_length_and_halve_in_size():
    model = make(max_length=64, kernel_size=8)
    assert model.config.scales == 4
    model.w[...] = model.w[...] * 0 + 1.0
    kernel = wide(model.kernel())[0, 0] * wide(model.norm)[0, 0]
    np.testing.assert_allclose(kernel, np.repeat([8.0, 4.0, 2.0, 1.0], [8, 8, 16, 32]), rtol=1e-6)


@pytest.mark.slow
def test_a_small_state_gives_nan_beyond_it_and_the_rest_right():
    model = make()
    want, _ = model(inputs())
    got, state = model(inputs()[:, :5], model.init_state(2, max_length=7))
    assert state.carried.shape == (2, 1, 6, WIDTH)
    rest, _ = model(inputs()[:, 5:], state)
    got = np.concatenate([got, rest], axis=1)
    np.testing.assert_allclose(got[:, :7], want[:, :7], atol=2e-6)
    assert np.isnan(got[:, 7:]).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_length": 0}, "max_length=0"),
        ({"kernel_size": 0}, "kernel_size=0"),
        ({"decay_min": 3.0}, "decay_min=3.0, decay_max=2.0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
