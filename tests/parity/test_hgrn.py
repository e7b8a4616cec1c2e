"""The mixer `hgrn` with real states against flash-linear-attention's HGRNAttention in PyTorch, weights copied over.

Their kernels need a GPU: in their place stand the library's own naive recurrence and the definition of the gated norm.
Everything around them is their module's code. Outputs to a relative 1e-5, with a lower bound and in the first layer.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from fla.layers import hgrn as theirs
from fla.ops.hgrn.naive import naive_recurrent_hgrn
from flax import nnx

from layers.mixers.recurrence.hgrn import HGRN, HGRNConfig

B, T, D = 2, 40, 12


class GatedNorm(torch.nn.RMSNorm):
    def forward(self, x, gate):
        return super().forward(x) * torch.nn.functional.silu(gate)


@pytest.mark.parametrize("layer", [0, 2])
def test_layer(layer, monkeypatch):
    def recurrence(x, g, initial_state, output_final_state, **_):
        return naive_recurrent_hgrn(x, g, initial_state, output_final_state)

    for name in ("chunk_hgrn", "fused_recurrent_hgrn"):
        monkeypatch.setattr(theirs, name, recurrence)
    monkeypatch.setattr(theirs, "swiglu", lambda x, y: torch.nn.functional.silu(x) * y)
    torch.manual_seed(0)
    module = theirs.HGRNAttention(hidden_size=D, layer_idx=layer).eval()
    module.g_norm = GatedNorm(D, eps=1e-5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    model = HGRN(
        HGRNConfig(width=D, state="real", norm="rms_norm", bias=False, layer=layer, depth=3), rngs=nnx.Rngs(0)
    )
    names = {"i_proj": model.input, "f_proj": model.forget, "g_proj": model.gate, "o_proj": model.output}
    for name, ours in names.items():
        ours.kernel[...] = jnp.asarray(getattr(module, name).weight.detach().numpy().T)
    model.norm.scale[...] = jnp.asarray(module.g_norm.weight.detach().numpy())
    bound = np.random.default_rng(1).uniform(0.2, 0.9, D).astype(np.float32)
    model.bound_logit[...] = jnp.asarray(np.log(bound / (1 - bound)))
    x = np.random.default_rng(0).standard_normal((B, T, D)).astype(np.float32)
    with torch.no_grad():
        want = module(torch.tensor(x), lower_bound=torch.tensor(bound))[0].numpy()
    got = np.asarray(model(jnp.asarray(x))[0])
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error <= 1e-5, f"relative error {error:.1e}"
