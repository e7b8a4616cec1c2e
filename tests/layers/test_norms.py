"""Norms against their equations in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.norms import NORMS, make_norm

RNG = np.random.default_rng(0)
X = (3 + 2 * RNG.standard_normal((3, 7, 6))).astype(np.float32)
MASK = RNG.random((3, 7)) < 0.6


def make(name, **options):
    norm = make_norm(name, options, width=6, dtype=jnp.float32, rngs=nnx.Rngs(0))
    norm.scale[...] = jnp.linspace(0.5, 1.5, 6)
    return norm


def test_layer_norm():
    norm = make("layer_norm", epsilon=1e-3)
    norm.bias[...] = jnp.linspace(-1, 1, 6)
    want = (X - X.mean(-1, keepdims=True)) / np.sqrt(X.var(-1, keepdims=True) + 1e-3)
    np.testing.assert_allclose(
        norm(jnp.asarray(X)), want * np.linspace(0.5, 1.5, 6) + np.linspace(-1, 1, 6), atol=1e-5
    )


def test_rms_norm():
    want = X / np.sqrt(np.square(X).mean(-1, keepdims=True) + 1e-6) * np.linspace(0.5, 1.5, 6)
    np.testing.assert_allclose(make("rms_norm")(jnp.asarray(X)), want, atol=1e-5)


@pytest.mark.parametrize("mask", [None, MASK])
def test_batch_norm_uses_and_tracks_the_moments_of_real_tokens(mask):
    norm = make("batch_norm", momentum=0.8)
    real = X.reshape(-1, 6) if mask is None else X[mask]
    got = norm(jnp.asarray(X), mask=None if mask is None else jnp.asarray(mask), training=True)
    want = (X - real.mean(0)) / np.sqrt(real.var(0) + 1e-5) * np.linspace(0.5, 1.5, 6)
    kept = slice(None) if mask is None else mask
    np.testing.assert_allclose(np.asarray(got)[kept], want[kept], atol=1e-5)
    np.testing.assert_allclose(norm.mean[...], 0.2 * real.mean(0), rtol=1e-5)
    np.testing.assert_allclose(norm.variance[...], 0.8 + 0.2 * real.var(0), rtol=1e-5)
    frozen = norm(jnp.asarray(X))
    want = (X - 0.2 * real.mean(0)) / np.sqrt(0.8 + 0.2 * real.var(0) + 1e-5) * np.linspace(0.5, 1.5, 6)
    np.testing.assert_allclose(frozen, want, atol=1e-5)
    np.testing.assert_allclose(norm.mean[...], 0.2 * real.mean(0), rtol=1e-5)


@pytest.mark.parametrize("mask", [None, MASK])
def test_gradient_of_batch_norm_goes_through_its_moments(mask):
    weights = RNG.standard_normal(X.shape).astype(np.float32)
    kept = np.ones(X.shape[:2], bool) if mask is None else mask
    weights = weights * kept[..., None]

    def literal(x):
        real = x.reshape(-1, 6)[np.flatnonzero(kept)]
        mean = real.mean(0, keepdims=True)
        variance = jnp.square(real - mean).mean(0, keepdims=True)
        return (weights * (x - mean[None]) / jnp.sqrt(variance + 1e-5)[None]).sum()

    def loss(x):
        norm = make("batch_norm")
        norm.scale[...] = jnp.ones(6)
        return (weights * norm(x, mask=None if mask is None else jnp.asarray(mask), training=True)).sum()

    np.testing.assert_allclose(jax.grad(loss)(X), jax.grad(literal)(X), atol=1e-5)


def test_batch_norm_does_not_see_padding():
    mask = jnp.asarray(MASK)
    outputs = []
    for fill in (0.0, 1e4, np.nan, np.inf):
        x = jnp.where(mask[..., None], X, fill)
        norm = make("batch_norm")
        outputs.append(
            (np.asarray(norm(x, mask=mask, training=True))[MASK], norm.mean[...], norm.variance[...])
        )
    for other in outputs[1:]:
        for got, want in zip(other, outputs[0], strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", NORMS)
def test_bfloat16_comes_out_of_float32_statistics(name):
    norm = make_norm(name, {}, width=6, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = jnp.asarray(1000 + X, jnp.bfloat16)
    got = norm(x, training=True)
    assert got.dtype == jnp.bfloat16
    exact = make_norm(name, {}, width=6, dtype=jnp.float32, rngs=nnx.Rngs(0))(
        x.astype(jnp.float32), training=True
    )
    np.testing.assert_allclose(np.asarray(got, np.float32), exact, atol=2e-2, rtol=1e-2)


def test_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="did you mean 'batch_norm'"):
        make_norm("batchnorm", {}, width=6, dtype=jnp.float32, rngs=nnx.Rngs(0))
