"""The mixers `rwkv4` and `lstm` against transformers' RwkvSelfAttention and PyTorch's LSTM, weights copied over.

RWKV-4 is compared with keys of size 1 and of size 100, and with the state that the other side returns; the LSTM with
its outputs and last states. To a relative 1e-5; to 1e-3 with large keys, whose own rounding is 1e-4 in the exponent.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.rwkv.configuration_rwkv import RwkvConfig
from transformers.models.rwkv.modeling_rwkv import RwkvSelfAttention

from layers.mixers.recurrence.lstm import LSTM, LSTMConfig
from layers.mixers.recurrence.rwkv4 import RWKV4, RWKV4Config

B, T, D = 2, 50, 12


def draw():
    return np.random.default_rng(0).standard_normal((B, T, D)).astype(np.float32)


def close(got, want, tolerance=1e-5):
    got, want = np.asarray(got), want.detach().numpy()
    assert got.shape == want.shape
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error <= tolerance, f"relative error {error:.1e}"


def array(tensor):
    return jnp.asarray(tensor.detach().numpy())


@pytest.mark.parametrize(("scale", "tolerance"), [(1.0, 1e-5), (100.0, 1e-3)])
def test_rwkv4(scale, tolerance):
    torch.manual_seed(0)
    module = RwkvSelfAttention(RwkvConfig(hidden_size=D, num_hidden_layers=1), layer_id=0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
        module.key.weight.mul_(scale)
    model = RWKV4(RWKV4Config(width=D), rngs=nnx.Rngs(0))
    for name in ("key", "value", "receptance", "output"):
        getattr(model, name).kernel[...] = array(getattr(module, name).weight.T)
    model.log_rate[...], model.bonus[...] = array(module.time_decay), array(module.time_first)
    mixing = [getattr(module, f"time_mix_{name}")[0, 0] for name in ("key", "value", "receptance")]
    model.mixing[...] = array(torch.stack(mixing))
    x = draw()
    empty = [torch.zeros(B, D, 1) for _ in range(4)] + [torch.full((B, D, 1), -1e38)]
    want, their_state = module(torch.tensor(x), state=empty, use_cache=True)
    y, state = model(jnp.asarray(x), model.init_state(B))
    close(y, want, tolerance)
    for ours, theirs in zip((state.carried.token[:, 0], *state.carried.sums), their_state[1:], strict=True):
        close(ours, theirs[:, :, 0], tolerance)


def test_lstm():
    torch.manual_seed(0)
    module = torch.nn.LSTM(D, D, batch_first=True)
    model = LSTM(LSTMConfig(width=D), rngs=nnx.Rngs(0))
    model.input.kernel[...] = array(module.weight_ih_l0.T)
    model.recurrent[...] = array(module.weight_hh_l0.T)
    model.bias[...] = array(module.bias_ih_l0 + module.bias_hh_l0)
    x = draw()
    want, (h, c) = module(torch.tensor(x))
    y, state = model(jnp.asarray(x), model.init_state(B))
    close(y, want)
    close(state.carried.h, h[0])
    close(state.carried.c, c[0])
