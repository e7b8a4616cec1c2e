"""Linear maps."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.parameters import linear


def test_the_gradient_of_a_bias_is_a_sum_in_float32():
    """A sum in bfloat16 has 8 bits, however many tokens it is over."""
    layer = linear(2, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x, weights = np.random.default_rng(0).uniform(0.5, 1.5, (2, 4096, 3))
    x, weights = jnp.asarray(x[None, :, :2], jnp.bfloat16), jnp.asarray(weights[None], jnp.bfloat16)

    def loss(layer):
        y = layer(x)
        assert y.dtype == jnp.bfloat16
        return (y * weights).astype(jnp.float32).sum()

    got = nnx.grad(loss)(layer).bias[...]
    want = np.asarray(weights, np.float64).sum((0, 1))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5)
