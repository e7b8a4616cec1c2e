"""Primitives as learners of a linear map in context: one step of gradient descent, and online least mean squares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.kernels.delta_rule import delta_rule
from layers.kernels.gated_linear_attention import gated_linear_attention

ROWS, POINTS, DIMS, TARGETS = 2, 4, 4, 3
IMPLEMENTATIONS = ["xla", pytest.param("reference", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def data():
    """Inputs (b, n, d), targets (b, n, p) and first weights (b, d, p) in float64."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, POINTS, DIMS))
    y = rng.normal(size=(ROWS, POINTS, TARGETS))
    start = rng.normal(size=(ROWS, DIMS, TARGETS))
    return x, y, start


def interleaved(reading, writing):
    """Returns two tokens per pair: at the first the input reads, at the second the pair is written."""
    return jnp.stack([reading, writing], axis=2).reshape(ROWS, 2 * POINTS, 1, -1).astype(jnp.float32)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_linear_attention_without_decay_is_one_step_of_gradient_descent(impl, data):
    """f(x) = (w_0 - P grad L(w_0))^T x for any preconditioner P and start w_0 (von Oswald et al. 2023, arXiv:2212.07677)."""
    x, y, start = data
    half = np.random.default_rng(1).normal(size=(DIMS, DIMS))
    preconditioner = half @ half.T

    @jax.jit
    def predictions(x, y, start, solved):
        reading = interleaved(x @ preconditioner, 0 * x)  # which reads P^-1 w_0 as w_0^T x
        keys, values = interleaved(0 * x, x), interleaved(0 * y, y - x @ start)
        state = solved[:, None]
        return gated_linear_attention(
            reading, keys, values, log_decay=jnp.zeros(1), scale=1.0, initial_state=state, impl=impl
        )[0][:, ::2, 0]

    @jax.jit
    @jax.grad
    def gradient(w, counted):
        errors = jnp.asarray(x) @ w - y
        return jnp.sum(jnp.square(errors) * counted[None, :, None]) / 2

    out = predictions(x, y, start, np.linalg.solve(preconditioner, start))
    for k in range(POINTS):
        stepped = start - preconditioner @ np.asarray(gradient(start, np.arange(POINTS) < k))
        np.testing.assert_allclose(out[:, k], np.einsum("bd,bdp->bp", x[:, k], stepped), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_delta_rule_is_online_least_mean_squares(impl, data):
    """w <- w - beta grad (|w^T x_k - y_k|^2 / 2), pair by pair (Widrow and Hoff 1960; Schlag et al. 2021, arXiv:2102.11174)."""
    x, y, start = data

    @jax.jit
    def learned(x, y, rates, start):
        reading, keys, values = (interleaved(*pair) for pair in ((x, 0 * x), (0 * x, x), (0 * y, y)))
        beta = interleaved(0 * rates[..., None], rates[..., None])[..., 0]
        return delta_rule(reading, keys, values, beta, scale=1.0, initial_state=start[:, None], impl=impl)

    rates = np.random.default_rng(2).uniform(0.1, 1.0, (ROWS, POINTS)) / np.square(x).sum(-1)
    out, last = learned(x, y, rates, start)
    w = start.copy()
    for k in range(POINTS):
        for row in range(ROWS):
            np.testing.assert_allclose(out[row, 2 * k, 0], w[row].T @ x[row, k], rtol=1e-4, atol=1e-5)
            error = w[row].T @ x[row, k] - y[row, k]
            w[row] -= rates[row, k] * np.outer(x[row, k], error)
    np.testing.assert_allclose(last[:, 0], w, rtol=1e-4, atol=1e-5)
    # With beta = 1 and orthonormal inputs, each pair is fitted and none is forgotten: least squares.
    x = np.linalg.qr(x)[0]
    _, last = learned(x, y, np.ones((ROWS, POINTS)), start)
    for row in range(ROWS):
        best, *_ = np.linalg.lstsq(x[row], y[row], rcond=None)
        np.testing.assert_allclose(last[row, 0], best, rtol=1e-5, atol=1e-5)
