"""`FNet` against the Fourier transform of transformers' FNet in PyTorch, both ways that it computes it."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.fnet.configuration_fnet import FNetConfig as TheirConfig
from transformers.models.fnet.modeling_fnet import FNetBasicFourierTransform

from layers.mixers.token_mixing.fnet import FNet, FNetConfig


@pytest.mark.parametrize("by_matrices", [False, True])
def test_outputs(by_matrices):
    """To 1e-6 of the largest value, without and with ids."""
    config = TheirConfig(hidden_size=12, use_tpu_fourier_optimizations=by_matrices, tpu_short_seq_length=9)
    x = np.random.default_rng(0).standard_normal((2, 9, 12)).astype(np.float32)
    (want,) = FNetBasicFourierTransform(config)(torch.tensor(x))
    mixer = FNet(FNetConfig(12), rngs=nnx.Rngs(0))
    padded = jnp.pad(jnp.asarray(x), ((0, 0), (2, 3), (0, 0)))
    ids = jnp.pad(jnp.ones((2, 9), jnp.int32), ((0, 0), (2, 3)))
    for got in (mixer(jnp.asarray(x))[0], mixer(padded, segment_ids=ids)[0][:, 2:11]):
        np.testing.assert_allclose(got, want.numpy(), atol=1e-6 * np.abs(want.numpy()).max())
