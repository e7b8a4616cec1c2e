"""S4 against its equation in NumPy: dense matrices, discretised and run one step at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers import hippo
from layers.mixers.state_space.s4 import S4, S4Config
from tests.layers.mixers.literal import wide

WIDTH, TIME = 4, 21


def make(**options):
    return S4(S4Config(**{"width": WIDTH, "state_size": 8, "dt_min": 0.02, **options}), rngs=nnx.Rngs(1))


def inputs(time=TIME):
    return jax.random.normal(jax.random.key(0), (2, time, WIDTH))


def pair(parameter):
    real, imaginary = wide(parameter)
    return real + 1j * imaginary


def systems(model):
    """Discretised (a, b, c) of every channel in complex128, all N modes, C recovered from C (I - a^L) if need be."""
    for channel in range(model.config.width):
        own = channel % model.config.systems
        modes = -np.exp(wide(model.modes.log_rate)[own]) + 1j * wide(model.modes.frequency)[own]
        p, b, c = pair(model.p)[own], pair(model.modes.b)[own], pair(model.c)[:, channel]
        modes, p, b = (np.r_[v, v.conj()] for v in (modes, p, b))
        c = np.concatenate([c, c.conj()], axis=1)
        a = np.diag(modes) - np.outer(p, p.conj())
        dt = np.exp(wide(model.log_dt)[channel])
        inverse = np.linalg.inv(np.eye(len(a)) - dt / 2 * a)
        a_bar, b_bar = inverse @ (np.eye(len(a)) + dt / 2 * a), dt * inverse @ b
        if model.config.max_length is not None:
            c = c @ np.linalg.inv(np.eye(len(a)) - np.linalg.matrix_power(a_bar, model.config.max_length))
        yield a_bar, b_bar, c


def literal(model, x):
    x = np.asarray(x, np.float64)
    outputs = wide(model.d) * x
    for channel, (a, b, c) in enumerate(systems(model)):
        for row in range(len(x)):
            u, h, g = x[row, :, channel], np.zeros(len(b), complex), np.zeros(len(b), complex)
            for t in range(len(u)):
                h = a @ h + b * u[t]
                outputs[row, t, channel] += (c[0] @ h).real
            if model.config.bidirectional:
                for t in range(len(u))[::-1]:
                    outputs[row, t, channel] += (c[1] @ g).real
                    g = a @ g + b * u[t]
    return outputs


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "options",
    [{}, {"max_length": TIME, "systems": 2}, {"max_length": 16}, {"bidirectional": True, "max_length": 40}],
)
def test_equals_the_dense_system_step_by_step(options):
    model, x = make(**options), inputs()
    want = literal(model, x)
    np.testing.assert_allclose(model(x)[0], want, atol=1e-5 * np.abs(want).max())
    if model.causal:
        np.testing.assert_allclose(model(x, model.init_state(2))[0], want, atol=1e-5 * np.abs(want).max())


def test_training_the_truncated_output_starts_from_the_same_function():
    # The two draw the same numbers, and one of them stores C (I - a^L).
    plain, truncated = make(), make(max_length=32)
    assert np.abs(wide(plain.c) - wide(truncated.c)).max() > 0.01
    want = plain(inputs())[0]
    np.testing.assert_allclose(truncated(inputs())[0], want, atol=1e-5 * np.abs(want).max())


def test_initial_system_is_hippo_legs():
    """C a^l b does not depend on the basis: HiPPO-LegS itself, discretised in float64, gives the same kernel."""
    size, length = 16, 30
    model = S4(S4Config(width=1, state_size=size, dt_min=0.05, dt_max=0.05), rngs=nnx.Rngs(0))
    a, b = hippo.hippo_legs(size)
    basis = hippo.dplr_legs(size, half=True).v
    c = 2 * (pair(model.c)[0, 0] @ basis.conj().T).real
    inverse = np.linalg.inv(np.eye(size) - 0.05 / 2 * a)
    a_bar, b_bar = inverse @ (np.eye(size) + 0.05 / 2 * a), 0.05 * inverse @ b
    want = [c @ np.linalg.matrix_power(a_bar, lag) @ b_bar for lag in range(length)]
    np.testing.assert_allclose(model.kernel(length)[0, 0], want, atol=2e-5 * np.abs(want).max())


def test_a_shorter_input_reads_the_first_taps_of_the_kernel():
    model = make(max_length=32)
    np.testing.assert_allclose(model.kernel(7), model.kernel(32)[..., :7], atol=1e-7)
    longer = model.kernel(40)[..., :32]
    np.testing.assert_allclose(longer, model.kernel(32), atol=1e-5 * np.abs(longer).max())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"state_size": 5}, "state_size=5.*even"),
        ({"systems": 3}, "systems=3 does not divide width=4"),
        ({"max_length": 0}, "max_length=0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        S4Config(width=4, **options)


def test_gradients_of_every_parameter_equal_those_of_central_differences():
    model, x = make(), jnp.asarray(inputs(9))
    graph, params = nnx.split(model)
    weights = jax.random.normal(jax.random.key(1), x.shape)

    def loss(params):
        return (nnx.merge(graph, params)(x)[0] * weights).sum()

    gradients = nnx.to_flat_state(jax.grad(loss)(params))
    for path, gradient in gradients:
        direction = np.random.default_rng(0).standard_normal(gradient[...].shape)
        values = []
        for sign in (1, -1):
            moved = nnx.merge(graph, params, copy=True)
            target = moved
            for name in path:
                target = getattr(target, name)
            before = wide(target)
            # Float64 numbers in place of the parameters: the literal reads them as they are.
            target.set_value(before + sign * 1e-5 * direction)
            values.append((literal(moved, x) * np.asarray(weights, np.float64)).sum())
        want = (values[0] - values[1]) / 2e-5
        got = (np.asarray(gradient[...], np.float64) * direction).sum()
        assert got == pytest.approx(want, rel=2e-3, abs=2e-3), path
