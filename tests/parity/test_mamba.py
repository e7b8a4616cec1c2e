"""`mamba` and `mamba2` against transformers' MambaMixer, JambaMambaMixer and Mamba2Mixer in PyTorch, weights copied over.

Outputs to a relative 1e-5, and the mixers' states after a prefix against the modules' outputs on the whole sequence.
"""

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers.models.jamba.configuration_jamba import JambaConfig
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.mamba.configuration_mamba import MambaConfig as TheirMambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.configuration_mamba2 import Mamba2Config as TheirMamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from layers.mixers.state_space.mamba import Mamba, MambaConfig
from layers.mixers.state_space.mamba2 import Mamba2, Mamba2Config

B, T, D = 2, 70, 16


def draw():
    return np.random.default_rng(0).standard_normal((B, T, D)).astype(np.float32)


def scrambled(module):
    """Weights that make every part of the layer matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return {name: jnp.asarray(v.detach().numpy()) for name, v in module.named_parameters()}


def copy(ours, theirs):
    for variable, value in zip(ours, theirs, strict=True):
        assert variable.shape == value.shape
        variable[...] = value


def agree(model, module):
    x = draw()
    with torch.no_grad():
        want = module(torch.tensor(x))
    want = (want[0] if isinstance(want, tuple) else want).numpy()

    def close(got):
        error = np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want)
        assert error <= 1e-5, f"relative error {error:.1e}"

    close(model(jnp.asarray(x))[0])
    first, state = model(jnp.asarray(x[:, :31]), model.init_state(B))
    close(jnp.concatenate([first, model(jnp.asarray(x[:, 31:]), state)[0]], axis=1))


def copy_mamba(model, p):
    copy(
        [
            model.input.kernel,
            model.convolution.weight,
            model.convolution.bias,
            model.selection.kernel,
            model.dt.kernel,
            model.dt_bias,
            model.log_a,
            model.d,
            model.output.kernel,
        ],
        [
            p["in_proj.weight"].T,
            p["conv1d.weight"][:, 0].T,
            p["conv1d.bias"],
            p["x_proj.weight"].T,
            p["dt_proj.weight"].T,
            p["dt_proj.bias"],
            p["A_log"],
            p["D"],
            p["out_proj.weight"].T,
        ],
    )


def test_mamba():
    config = TheirMambaConfig(hidden_size=D, state_size=4, expand=2, conv_kernel=4, time_step_rank=3)
    module = MambaMixer(config, layer_idx=0)
    model = Mamba(MambaConfig(width=D, state_size=4, dt_rank=3), rngs=nnx.Rngs(0))
    copy_mamba(model, scrambled(module))
    agree(model, module)


def test_mamba_of_jamba():
    config = JambaConfig(hidden_size=D, mamba_d_state=4, mamba_dt_rank=3, mamba_d_conv=4, mamba_expand=2)
    module = JambaMambaMixer(config, layer_idx=0)
    p = scrambled(module)
    options = dict(state_size=4, dt_rank=3, inner_norm=True, epsilon=config.rms_norm_eps)
    model = Mamba(MambaConfig(width=D, **options), rngs=nnx.Rngs(0))
    copy_mamba(model, p)
    copy(
        [norm.scale for norm in model.inner_norms],
        [p[f"{name}_layernorm.weight"] for name in ("dt", "b", "c")],
    )
    agree(model, module)


def test_mamba2():
    config = TheirMamba2Config(
        hidden_size=D,
        state_size=4,
        expand=2,
        head_dim=8,
        num_heads=4,
        n_groups=2,
        conv_kernel=4,
        chunk_size=16,
    )
    module = Mamba2Mixer(config, layer_idx=0).eval()
    p = scrambled(module)
    model = Mamba2(Mamba2Config(width=D, state_size=4, head_dim=8, groups=2), rngs=nnx.Rngs(0))
    copy(
        [
            model.input.kernel,
            model.convolution.weight,
            model.convolution.bias,
            model.dt_bias,
            model.log_a,
            model.d,
            model.scale,
            model.output.kernel,
        ],
        [
            p["in_proj.weight"].T,
            p["conv1d.weight"][:, 0].T,
            p["conv1d.bias"],
            p["dt_bias"],
            p["A_log"],
            p["D"],
            p["norm.weight"],
            p["out_proj.weight"].T,
        ],
    )
    agree(model, module)
