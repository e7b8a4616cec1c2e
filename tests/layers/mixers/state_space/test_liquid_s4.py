"""Liquid-S4 against its equation in NumPy with dense matrices and explicit products."""

import jax
import numpy as np
import pytest
from flax import nnx

from layers.mixers.state_space.liquid_s4 import LiquidS4, LiquidS4Config
from tests.layers.mixers.literal import wide
from tests.layers.mixers.state_space.test_s4 import systems

WIDTH, TIME = 4, 12


def make(**options):
    defaults = {"state_size": 4, "dt_min": 0.02}
    return LiquidS4(LiquidS4Config(width=WIDTH, **{**defaults, **options}), rngs=nnx.Rngs(1))


def inputs():
    return jax.random.normal(jax.random.key(0), (2, TIME, WIDTH))


def literal(model, x):
    x = np.asarray(x, np.float64)
    y = wide(model.s4.d) * x
    for channel, (a, b, c) in enumerate(systems(model.s4)):
        u = x[..., channel]
        products, vectors = [u], [b]
        for _ in range(model.config.degree - 1):
            last = products[-1]
            products.append(last * np.concatenate([np.zeros((2, 1)), last[:, :-1]], axis=1))
            # The outer product of the vector with itself, summed over one of its axes.
            vectors.append(np.outer(vectors[-1], vectors[-1]).sum(1))
        for row in range(2):
            for p, (product, vector) in enumerate(zip(products, vectors, strict=True)):
                for t in range(TIME):
                    for lag in range(t + 1 if p == 0 or model.config.kernel == "kb" else 1):
                        tap = c[0] @ np.linalg.matrix_power(a, lag) @ vector
                        y[row, t, channel] += (tap * product[row, t - lag]).real
    return y


@pytest.mark.sample(4)
@pytest.mark.parametrize("kernel", ["pb", "kb"])
@pytest.mark.parametrize("degree", [2, 3])
def test_equals_the_equation(kernel, degree):
    model = make(kernel=kernel, degree=degree)
    want = literal(model, inputs())
    np.testing.assert_allclose(model(inputs())[0], want, atol=1e-5 * np.abs(want).max())
    np.testing.assert_allclose(model(inputs(), model.init_state(2))[0], want, atol=1e-5 * np.abs(want).max())


def test_products_of_degree_two_are_even_in_the_input():
    """y(x) + y(-x) is what the products add; S4 itself cancels."""
    model, x = make(kernel="kb"), inputs()
    even = (model(x)[0] + model(-x)[0]) / 2
    want = literal(model, x) - literal_s4(model, x)
    np.testing.assert_allclose(even, want, atol=1e-5 * np.abs(want).max())
    assert np.abs(want).max() > 1e-3


def literal_s4(model, x):
    return np.asarray(model.s4(x)[0], np.float64)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"degree": 1}, "degree=1.*at least 2"),
        ({"kernel": "ab"}, "kernel='ab'"),
        ({"systems": 3}, "systems=3 does not divide width=4"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
