"""S4D against its equation in NumPy, its initial eigenvalues, and convolutions within segments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.mixers.state_space.s4d import S4D, S4DConfig
from layers.parts.segmented_convolution import convolve
from tests.layers.mixers.literal import wide

WIDTH, TIME = 4, 21


def make(**options):
    return S4D(S4DConfig(width=WIDTH, state_size=8, **options), rngs=nnx.Rngs(1))


def inputs(time=TIME):
    return jax.random.normal(jax.random.key(0), (2, time, WIDTH))


def literal_kernel(model, length):
    """K_l = C A_bar^l B_bar of the full system, both halves of the conjugate pairs, channel by channel in complex128."""
    config = model.config
    kernels = []
    for channel in range(config.width):
        own = channel % config.systems
        a = -np.exp(wide(model.modes.log_rate)[own]) + 1j * wide(model.modes.frequency)[own]
        b = (wide(model.modes.b)[0] + 1j * wide(model.modes.b)[1])[own]
        c = (wide(model.c)[0] + 1j * wide(model.c)[1])[:, channel]
        a, b, c = np.r_[a, a.conj()], np.r_[b, b.conj()], np.concatenate([c, c.conj()], axis=1)
        dt = np.exp(wide(model.log_dt)[channel])
        if config.discretization == "zoh":
            a_bar, b_bar = np.exp(dt * a), (np.exp(dt * a) - 1) / a * b
        else:
            a_bar, b_bar = (1 + dt * a / 2) / (1 - dt * a / 2), dt * b / (1 - dt * a / 2)
        kernels.append([(c * b_bar * a_bar**lag).sum(1) for lag in range(length)])
    kernels = np.array(kernels)
    assert np.abs(kernels.imag).max() < 1e-12
    return np.moveaxis(kernels.real, 2, 0)


def literal(model, x):
    x = np.asarray(x, np.float64)
    time = x.shape[1]
    kernel = literal_kernel(model, time)
    y = wide(model.d) * x
    for t in range(time):
        for s in range(time):
            if s <= t:
                y[:, t] += kernel[0, :, t - s] * x[:, s]
            elif model.config.bidirectional:
                y[:, t] += kernel[1, :, s - t - 1] * x[:, s]
    return y


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "options",
    [
        {"init": "legs"},
        {"init": "inv", "discretization": "bilinear"},
        {"init": "lin", "systems": 2},
        {"init": "legs", "bidirectional": True, "systems": WIDTH},
    ],
)
def test_equals_the_equation(options):
    model = make(**options)
    want = literal(model, inputs())
    np.testing.assert_allclose(model(inputs())[0], want, atol=2e-6 * np.abs(want).max())


def test_initial_eigenvalues():
    def imaginary(init, size):
        model = S4D(S4DConfig(width=1, state_size=size, init=init), rngs=nnx.Rngs(0))
        np.testing.assert_allclose(np.exp(model.modes.log_rate[...]), 0.5, rtol=1e-6)
        return np.sort(np.asarray(model.modes.frequency[0]))

    np.testing.assert_allclose(imaginary("legs", 4), [0.556501, 4.603293], rtol=1e-6)
    np.testing.assert_allclose(
        imaginary("legs", 64)[[0, 1, 2, -1]], [0.263857, 0.905859, 1.702968, 1303.273843], 2e-6
    )
    np.testing.assert_allclose(imaginary("lin", 8), np.pi * np.arange(4), rtol=1e-6)
    # Inv is close to LegS at large sizes: the largest of 64 is N^2/pi minus N/pi.
    np.testing.assert_allclose(
        imaginary("inv", 64)[[0, -1]], [64 / np.pi * (64 / 63 - 1), 64 * 63 / np.pi], rtol=1e-5
    )


def test_initial_output_and_step_sizes():
    model = S4D(S4DConfig(width=512, state_size=16), rngs=nnx.Rngs(0))
    assert np.square(wide(model.c)).sum(0).mean() == pytest.approx(1.0, rel=0.05)
    steps = np.exp(wide(model.log_dt))
    assert steps.min() >= 0.001
    assert steps.max() <= 0.1
    assert np.median(steps) == pytest.approx(0.01, rel=0.3)


@pytest.mark.slow
def test_long_prefill_in_chunks_equals_the_convolution():
    model, x = make(), inputs(150)
    ids = jnp.asarray(np.repeat([[3, 0, 3, 5, 5, 1], [1, 1, 2, 0, 0, 2]], 25, axis=1))
    for segment_ids in (None, ids):
        want, _ = model(x, segment_ids=segment_ids)
        got, _ = model(x, model.init_state(2), segment_ids=segment_ids)
        real = np.ones((2, 150), bool) if segment_ids is None else np.asarray(ids) != 0
        np.testing.assert_allclose(np.asarray(got)[real], np.asarray(want)[real], atol=2e-5)


def test_gradients_of_a_convolution_within_segments_equal_those_of_the_sum():
    x, time = inputs(9), 9
    ids = np.array([[1, 1, 0, 1, 2, 2, 2, 0, 1], [0, 4, 4, 4, 4, 4, 0, 0, 0]])
    kernel, ahead = jax.random.normal(jax.random.key(1), (2, WIDTH, 6))
    weights = jax.random.normal(jax.random.key(2), x.shape) * (ids != 0)[..., None]
    matrix = np.zeros((2, time, time), int)
    for row in range(2):
        runs, place = np.cumsum(np.r_[0, np.diff(ids[row][ids[row] != 0]) != 0]), np.flatnonzero(ids[row])
        for i, t in enumerate(place):
            for j, s in enumerate(place):
                matrix[row, t, s] = i - j + 100 if runs[i] == runs[j] else 0

    def dense(x, kernel, ahead):
        lag = matrix - 100
        taps = jnp.concatenate([ahead[:, ::-1], kernel, jnp.zeros((WIDTH, 1))], axis=1)
        index = jnp.where((matrix > 0) & (lag >= -6) & (lag < 6), lag + 6, 12)
        return jnp.einsum("dbts,bsd->btd", taps[:, index], x)

    def ours(x, kernel, ahead):
        return convolve(x, kernel, ahead=ahead, segment_ids=jnp.asarray(ids))

    def gradients(f):
        return jax.grad(lambda *args: (f(*args) * weights).sum(), argnums=(0, 1, 2))(x, kernel, ahead)

    np.testing.assert_allclose(ours(x, kernel, ahead), dense(x, kernel, ahead), atol=2e-6)
    for got, want in zip(gradients(ours), gradients(dense), strict=True):
        np.testing.assert_allclose(got, want, atol=5e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"init": "real"}, "init='real'.*legs"),
        ({"discretization": "euler"}, "discretization='euler'.*bilinear"),
        ({"state_size": 5}, "state_size=5.*even"),
        ({"systems": 3}, "systems=3 does not divide width=4"),
        ({"dt_min": 0.1, "dt_max": 0.01}, "dt_min=0.1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        S4DConfig(width=4, **options)
