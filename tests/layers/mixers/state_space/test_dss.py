"""DSS against its equation in NumPy, with a plain softmax over time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.mixers.state_space.dss import DSS, DSSConfig
from tests.layers.mixers.literal import wide

WIDTH, TIME = 3, 17


def make(**options):
    # Steps long enough for the 1e-7 in the paper's reciprocal not to show.
    defaults = {"state_size": 6, "max_length": 25, "dt_min": 0.1, "dt_max": 0.2}
    return DSS(DSSConfig(width=WIDTH, **{**defaults, **options}), rngs=nnx.Rngs(1))


def inputs(time=TIME):
    return jax.random.normal(jax.random.key(0), (2, time, WIDTH))


def literal_kernel(model):
    """K over max_length steps, complex128; z has a step size for its real part and one for its imaginary part."""
    config = model.config
    rate = -np.exp(wide(model.rate)) if config.kernel == "exp" else wide(model.rate)
    a = rate + 1j * wide(model.frequency)
    dt = np.exp(wide(model.log_dt))
    z = dt[:, :1] * a.real + 1j * dt[:, 1:] * a.imag
    w = wide(model.w)[0] + 1j * wide(model.w)[1]
    powers = np.exp(z[..., None] * np.arange(config.max_length))
    if config.kernel == "softmax":
        shares = powers / powers.sum(-1, keepdims=True)
    else:
        shares = (np.exp(z) - 1)[..., None] * powers
    return np.einsum("dn,dnl->dl", w / a, shares).real


def literal(model, x):
    kernel, x = literal_kernel(model), np.asarray(x, np.float64)
    y = wide(model.d) * x
    for t in range(x.shape[1]):
        for s in range(t + 1):
            y[:, t] += kernel[:, t - s] * x[:, s]
    return y


@pytest.mark.sample(4)
@pytest.mark.parametrize("kernel", ["softmax", "exp"])
@pytest.mark.parametrize("moved", [False, True])
def test_equals_the_equation(kernel, moved):
    model, x = make(kernel=kernel), inputs()
    if moved:
        # Step sizes of real and imaginary part apart, and with "softmax" a mode that grows.
        model.log_dt[...] = model.log_dt[...] + jnp.array([[0.5, -0.3]])
        if kernel == "softmax":
            model.rate[...] = model.rate[...].at[1].set(0.7)
    want = literal(model, x)
    np.testing.assert_allclose(model(x)[0], want, atol=1e-5 * np.abs(want).max())
    np.testing.assert_allclose(model(x, model.init_state(2))[0], want, atol=1e-5 * np.abs(want).max())


@pytest.mark.slow
def test_softmax_kernel_of_another_length_differs_by_a_factor_a_mode():
    """With one mode K_L / K_2L is one number: the ratio of the two normalisers."""
    short, long = make(state_size=1, max_length=20), make(state_size=1, max_length=40)
    x = jnp.zeros((1, 20, WIDTH)).at[:, 0].set(1.0)
    a = complex(-0.5, float(wide(short.frequency)[0]))
    z = np.exp(wide(short.log_dt)[:, 0]) * a
    want = (np.exp(z * 40) - 1) / (np.exp(z * 20) - 1)
    w = wide(short.w)[0, :, 0] + 1j * wide(short.w)[1, :, 0]
    long.w[...] = jnp.asarray(np.stack([(w * want).real, (w * want).imag])[..., None], jnp.float32)
    np.testing.assert_allclose(long(x)[0], short(x)[0], atol=1e-5)


def test_initial_values():
    model = make(state_size=32, kernel="exp")
    np.testing.assert_allclose(np.exp(wide(model.rate)), 0.5, rtol=1e-6)
    # The positive half of HiPPO-LegS of size 64.
    np.testing.assert_allclose(
        np.sort(wide(model.frequency))[[0, 1, 2, -1]], [0.263857, 0.905859, 1.702968, 1303.273843], 2e-6
    )
    assert (wide(model.log_dt)[:, 0] == wide(model.log_dt)[:, 1]).all()
    big = DSS(DSSConfig(width=512, state_size=4), rngs=nnx.Rngs(0))
    assert np.square(wide(big.w)).mean() == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize(
    "options, message", [({"kernel": "relu"}, "kernel='relu'"), ({"max_length": 0}, "max_length=0")]
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_inputs_longer_than_the_softmax_are_refused():
    with pytest.raises(ValueError, match="26 steps, more than max_length=25"):
        make()(inputs(26))
    make(kernel="exp")(inputs(26))
