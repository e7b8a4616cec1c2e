"""Rotary positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.positions import rotary


def test_is_a_rotation_in_the_complex_plane():
    x = np.random.default_rng(0).standard_normal((1, 5, 2, 6)).astype(np.float32)
    got = np.asarray(rotary(jnp.asarray(x), jnp.arange(5)[None], 50.0))
    pairs = x[..., :3] + 1j * x[..., 3:]
    turned = pairs * np.exp(1j * np.arange(5)[None, :, None, None] * 50.0 ** (-np.arange(0, 6, 2) / 6))
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=1e-6)


def test_products_depend_on_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    products = [
        float(jnp.sum(rotary(q, jnp.array([[i]])) * rotary(k, jnp.array([[i - 3]])))) for i in (3, 50, 1000)
    ]
    np.testing.assert_allclose(products, products[0], rtol=1e-4)


def test_an_odd_head_is_refused():
    with pytest.raises(ValueError, match="even head size, got 5"):
        rotary(jnp.zeros((1, 2, 1, 5)), jnp.zeros((1, 2), jnp.int32))
