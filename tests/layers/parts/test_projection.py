"""Parts of a linear map against slices of its outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.parameters import linear
from layers.parts.projection import project


@pytest.mark.parametrize("bias", [True, False])
def test_parts_are_slices_of_all_outputs(bias):
    layer = linear(5, 9, bias=bias, rngs=nnx.Rngs(0))
    if bias:
        layer.bias[...] = jnp.arange(9.0)
    x = jax.random.normal(jax.random.key(1), (2, 3, 5))
    parts = project(layer, x, (4, 2, 3))
    for part, want in zip(parts, np.split(layer(x), [4, 6], axis=-1), strict=True):
        np.testing.assert_allclose(part, want, rtol=1e-6, atol=1e-6)


def test_sizes_cover_all_outputs():
    layer = linear(5, 9, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"sizes=\(4, 2\) sum to 6; expected 9"):
        project(layer, jnp.zeros((1, 1, 5)), (4, 2))
