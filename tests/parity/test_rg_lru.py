"""The mixer `rg_lru` against the recurrent block of transformers' RecurrentGemma in PyTorch, weights copied over.

Outputs to a relative 1e-5, of the whole sequence and in two pieces, and of packed rows where positions start anew.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.recurrent_gemma.configuration_recurrent_gemma import RecurrentGemmaConfig
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

from layers.mixers.recurrence.rg_lru import RGLRU, RGLRUConfig

B, T, D, HEADS = 2, 40, 12, 3


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    config = RecurrentGemmaConfig(
        hidden_size=D,
        lru_width=D,
        num_attention_heads=HEADS,
        conv1d_width=4,
        hidden_activation="gelu_pytorch_tanh",
    )
    module = RecurrentGemmaRecurrentBlock(config, 0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    p = {name: jnp.asarray(v.detach().numpy()) for name, v in module.named_parameters()}
    model = RGLRU(RGLRUConfig(width=D, heads=HEADS), rngs=nnx.Rngs(0))
    for name, layer in (("linear_y", model.gate), ("linear_x", model.input), ("linear_out", model.output)):
        layer.kernel[...], layer.bias[...] = p[f"{name}.weight"].T, p[f"{name}.bias"]
    model.convolution.weight[...] = p["conv_1d.weight"][:, 0].T
    model.convolution.bias[...] = p["conv_1d.bias"]
    for kind, ours in (("weight", model.gates), ("bias", model.gate_biases)):
        ours[...] = jnp.stack([p[f"rg_lru.recurrent_gate_{kind}"], p[f"rg_lru.input_gate_{kind}"]])
    model.decay[...] = p["rg_lru.recurrent_param"]
    return model, module


def close(got, want):
    error = np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want)
    assert error <= 1e-5, f"relative error {error:.1e}"


def test_whole_and_in_pieces(pair):
    model, module = pair
    x = np.random.default_rng(0).standard_normal((B, T, D)).astype(np.float32)
    positions = torch.arange(T)[None].expand(B, T)
    with torch.no_grad():
        want = module(torch.tensor(x), positions, None, use_cache=False)[0].numpy()
    close(model(jnp.asarray(x))[0], want)
    first, state = model(jnp.asarray(x[:, :23]), model.init_state(B))
    close(jnp.concatenate([first, model(jnp.asarray(x[:, 23:]), state)[0]], axis=1), want)


def test_packed_recurrence(pair):
    """Their convolution reaches over the border, so the rows of both sides are compared segment by segment."""
    model, module = pair
    x = np.random.default_rng(1).standard_normal((1, T, D)).astype(np.float32)
    ids = jnp.asarray([[1] * 15 + [2] * (T - 15)])
    got, _ = model(jnp.asarray(x), segment_ids=ids)
    for where in (slice(0, 15), slice(15, T)):
        part = torch.tensor(x[:, where])
        with torch.no_grad():
            want = module(part, torch.arange(part.shape[1])[None], None, use_cache=False)[0].numpy()
        close(got[:, where], want)
