"""Mixers with a matrix memory against layers of flash-linear-attention and transformers, weights copied over.

flash-linear-attention: GatedLinearAttention, MultiScaleRetention, DeltaNet, GatedDeltaNet, KimiDeltaAttention and
RWKV7Attention (the first layer), made to run on the CPU by `fla_layers`, and the naive linear attention. transformers:
the layers of Qwen3-Next, Kimi Linear and MiniMax.

Outputs and gradients of the input to a relative 2e-5; the mixer is also run in two pieces with its state, and its last
memory is compared where the other side gives one.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fla.layers import delta_net, gated_deltanet, gla, kda, multiscale_retention, rwkv7
from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
from flax import nnx
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig
from transformers.models.minimax.configuration_minimax import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
from transformers.models.qwen3_next import modeling_qwen3_next
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig

from layers.mixers import make_mixer
from tests.parity import fla_layers

B, T, D = 2, 70, 16


@pytest.fixture
def plain(monkeypatch):
    """Lets the layers run on the CPU; a list to which every operation appends its final memory."""
    return fla_layers.in_torch(monkeypatch)


def scrambled(module, scale=0.4):
    """The module with weights that make every part of it matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn_like(parameter))
    return module


def array(tensor):
    return jnp.asarray(tensor.detach().numpy())


def fill(model, values):
    """Sets parameters of the model, named by dotted paths, and fails if one is left out."""
    state = {".".join(map(str, path)): v for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert set(state) == set(values)
    for name, value in values.items():
        assert state[name].shape == value.shape, name
        state[name][...] = value
    nnx.update(model, nnx.from_flat_state([(tuple(n.split(".")), v) for n, v in state.items()]))


def kernels(**modules):
    """Kernels, transposed, of linear maps; a tuple of them stands for one map with all their outputs."""
    return {
        name.replace("__", ".") + ".kernel": jnp.concatenate(
            [array(m.weight).T for m in (group if isinstance(group, tuple) else (group,))], axis=1
        )
        for name, group in modules.items()
    }


def taps_of(module):
    """The taps of its three convolutions as those of one."""
    convolutions = (module.q_conv1d, module.k_conv1d, module.v_conv1d)
    return jnp.concatenate([array(c.weight)[:, 0].T for c in convolutions], axis=1)


def convolved(module):
    """What all layers with a short convolution share."""
    return {"memory.convolution.weight": taps_of(module)} | kernels(
        memory__projection=(module.q_proj, module.k_proj, module.v_proj), memory__strength=module.b_proj
    )


def close(got, want, tolerance=2e-5):
    got, want = np.asarray(got), want.detach().numpy()
    assert got.shape == want.shape
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error <= tolerance, f"relative error {error:.1e}"


def agree(model, module, memories=(), **arguments):
    x = np.random.default_rng(0).standard_normal((B, T, D)).astype(np.float32)
    tensor = torch.tensor(x, requires_grad=True)
    want = module(tensor, **arguments)
    want = want[0] if isinstance(want, tuple) else want
    weights = np.random.default_rng(1).standard_normal(want.shape).astype(np.float32)
    (want * torch.tensor(weights)).sum().backward()
    graph, variables = nnx.split(model)

    @jax.jit
    def run(x, state=None):
        return nnx.merge(graph, variables, copy=True)(x, state)

    y, pullback = jax.vjp(lambda x: run(x)[0], jnp.asarray(x))
    close(y, want)
    close(pullback(jnp.asarray(weights))[0], tensor.grad)
    first, state = run(x[:, :31], model.init_state(B))
    second, state = run(x[:, 31:], state)
    close(jnp.concatenate([first, second], axis=1), want)
    for memory in memories:
        close(getattr(state.carried, "memory", state.carried), memory)


def make(name, **options):
    return make_mixer(name, options, given={"width": D}, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("convolution", [False, True])
def test_gla(plain, convolution):
    """With convolutions also with keys and values that two heads share."""
    options = {"use_short_conv": True, "conv_size": 3, "num_kv_heads": 1} if convolution else {}
    module = gla.GatedLinearAttention(hidden_size=D, num_heads=2, gate_low_rank_dim=3, **options)
    scrambled(module)
    model = make("gla", heads=2, gate_rank=3, **({"taps": 3, "kv_heads": 1} if convolution else {}))
    values = kernels(
        query=module.q_proj,
        key=module.k_proj,
        value=module.v_proj,
        gate=module.g_proj,
        decay__inner=module.gk_proj[0],
        decay__outer=module.gk_proj[1],
        output=module.o_proj,
    )
    values |= {"decay.outer.bias": array(module.gk_proj[1].bias)}
    if convolution:
        values |= {"convolution.weight": taps_of(module)}
    fill(model, values | {"norm.scale": array(module.g_norm_swish_gate.weight)})
    agree(model, module, plain)
    assert len(plain) == 1


@pytest.mark.parametrize("shared", [None, 1])
def test_retention(plain, shared):
    module = multiscale_retention.MultiScaleRetention(hidden_size=D, num_heads=2, num_kv_heads=shared)
    scrambled(module)
    # Its frequencies are those of plain rotary positions.
    size = D // 2
    model = make(
        "retnet",
        heads=2,
        kv_heads=shared,
        affine=True,
        epsilon=1e-5,
        rope_base=10_000.0 ** ((size - 2) / size),
    )
    values = kernels(
        query=module.q_proj,
        key=module.k_proj,
        value=module.v_proj,
        gate=module.g_proj,
        output=module.o_proj,
    )
    fill(model, values | {"norm.scale": array(module.g_norm_swish_gate.weight)})
    agree(model, module)


@pytest.mark.parametrize("gate", [False, True])
def test_deltanet(plain, gate):
    module = delta_net.DeltaNet(hidden_size=D, num_heads=2, use_gate=gate, allow_neg_eigval=gate)
    model = make("deltanet", heads=2, gate=gate, negative_eigenvalues=gate)
    values = convolved(scrambled(module)) | kernels(output=module.o_proj)
    values |= kernels(gate=module.g_proj) if gate else {}
    fill(model, values | {"norm.scale": array(module.o_norm.weight)})
    agree(model, module, plain)


@pytest.mark.parametrize("negative", [False, True])
def test_gated_deltanet(plain, negative):
    options = {"num_heads": 2, "num_v_heads": 4, "head_dim": 6, "expand_v": 1.5}
    module = gated_deltanet.GatedDeltaNet(hidden_size=D, allow_neg_eigval=negative, **options)
    values = convolved(scrambled(module)) | kernels(
        rate=module.a_proj, gate=module.g_proj, output=module.o_proj
    )
    values |= {"decay.log_rate": array(module.A_log), "decay.bias": array(module.dt_bias)}
    options = {"heads": 2, "value_heads": 4, "key_dim": 6, "value_dim": 9}
    model = make("gated_deltanet", negative_eigenvalues=negative, **options)
    fill(model, values | {"norm.scale": array(module.o_norm.weight)})
    agree(model, module, plain)


@pytest.mark.parametrize(("negative", "outputs"), [(False, 2), (True, 4)])
def test_kimi_delta_attention(plain, negative, outputs):
    options = {"num_heads": 2, "num_v_heads": outputs, "head_dim": 6}
    module = kda.KimiDeltaAttention(hidden_size=D, allow_neg_eigval=negative, **options)
    values = convolved(scrambled(module)) | kernels(
        rate__inner=module.f_proj[0],
        rate__outer=module.f_proj[1],
        gate__inner=module.g_proj[0],
        gate__outer=module.g_proj[1],
        output=module.o_proj,
    )
    values |= {"decay.log_rate": array(module.A_log), "decay.bias": array(module.dt_bias).reshape(outputs, 6)}
    values |= {"gate.outer.bias": array(module.g_proj[1].bias)}
    model = make("kda", heads=2, value_heads=outputs, head_dim=6, negative_eigenvalues=negative)
    fill(model, values | {"norm.scale": array(module.o_norm.weight)})
    agree(model, module, plain)


def test_rwkv7(plain):
    ranks = {"decay_low_rank_dim": 5, "a_low_rank_dim": 3, "gate_low_rank_dim": 4, "v_low_rank_dim": 2}
    module = rwkv7.RWKV7Attention(hidden_size=D, head_dim=8, layer_idx=0, num_hidden_layers=3, **ranks)
    model = make("rwkv7", head_dim=8, decay_rank=5, rate_rank=3, gate_rank=4, layer=0, depth=3)
    scale, mixing = array(module.g_norm.weight), [getattr(module, f"x_{s}") for s in "rwkvag"]
    # Both sides start alike but for the large matrices.
    np.testing.assert_allclose(model.norm.scale[...], scale, rtol=1e-6)
    np.testing.assert_allclose(model.mixing[...], np.stack([array(m)[0, 0] for m in mixing]), atol=1e-6)
    for ours, theirs in ((model.decay, module.w_lora), (model.rate, module.a_lora)):
        np.testing.assert_allclose(ours.outer.bias[...], array(theirs.lora[2].bias), atol=1e-5)
    np.testing.assert_allclose(model.removal[...], array(module.k_k), atol=1e-6)
    scrambled(module)
    values = kernels(
        receptance=module.r_proj,
        key=module.k_proj,
        value=module.v_proj,
        output=module.o_proj,
        decay__inner=module.w_lora.lora[0],
        decay__outer=module.w_lora.lora[2],
        rate__inner=module.a_lora.lora[0],
        rate__outer=module.a_lora.lora[2],
        gate__inner=module.g_lora.lora[0],
        gate__outer=module.g_lora.lora[2],
    )
    values |= {
        "mixing": jnp.stack([array(m)[0, 0] for m in mixing]),
        "decay.outer.bias": array(module.w_lora.lora[2].bias),
        "rate.outer.bias": array(module.a_lora.lora[2].bias),
        "removal": array(module.k_k),
        "replacement": array(module.k_a),
        "bonus": array(module.r_k),
        "norm.scale": array(module.g_norm.weight),
        "norm.bias": array(module.g_norm.bias),
    }
    fill(model, values)
    agree(model, module, plain)


def test_linear_attention():
    """The normalised operation between our projections."""
    model = make("linear_attention", heads=2)

    def theirs(x):
        def apply(linear, x):
            return x @ torch.tensor(np.asarray(linear.kernel[...])) + torch.tensor(
                np.asarray(linear.bias[...])
            )

        q, k, v = (apply(f, x).reshape(B, T, 2, -1) for f in (model.query, model.key, model.value))
        o, _ = naive_recurrent_linear_attn(F.elu(q) + 1, F.elu(k) + 1, v, normalize=True)
        return apply(model.output, o.reshape(B, T, -1))

    agree(model, theirs)


def in_torch(monkeypatch, modeling, rule):
    """Replaces what transformers would take from other packages that are installed by its own PyTorch code."""
    for name in ("causal_conv1d_fn", rule):
        monkeypatch.setattr(modeling, name, inspect.unwrap(getattr(modeling, name)))


def test_gated_deltanet_of_qwen3_next(monkeypatch):
    """Its projections are laid out by key head: q, k, then v and the gate of the value heads that share them."""
    in_torch(monkeypatch, modeling_qwen3_next, "torch_chunk_gated_delta_rule")
    options = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6}
    config = Qwen3NextConfig(hidden_size=D, linear_value_head_dim=5, num_hidden_layers=1, **options)
    module = scrambled(modeling_qwen3_next.Qwen3NextGatedDeltaNet(config, 0))
    by_head = array(module.in_proj_qkvz.weight).T.reshape(D, 2, -1)
    q, k, v, z = (part.reshape(D, -1) for part in jnp.split(by_head, [6, 12, 22], axis=2))
    b, a = (
        part.reshape(D, -1) for part in jnp.split(array(module.in_proj_ba.weight).T.reshape(D, 2, 4), 2, 2)
    )
    values = kernels(output=module.out_proj) | {
        "memory.projection.kernel": jnp.concatenate([q, k, v], axis=1),
        "memory.convolution.weight": array(module.conv1d.weight)[:, 0].T,
        "memory.strength.kernel": b,
        "rate.kernel": a,
        "gate.kernel": z,
        "decay.log_rate": array(module.A_log),
        "decay.bias": array(module.dt_bias),
        "norm.scale": array(module.norm.weight),
    }
    options = {"heads": 2, "value_heads": 4, "key_dim": 6, "value_dim": 5, "epsilon": config.rms_norm_eps}
    model = make("gated_deltanet", **options)
    fill(model, values)
    agree(model, module)


def test_kimi_delta_attention_of_kimi_linear(monkeypatch):
    in_torch(monkeypatch, modeling_kimi_linear, "chunk_kimi_delta_attention")
    options = {"linear_num_heads": 2, "linear_head_dim": 6, "linear_conv_kernel_dim": 4}
    config = KimiLinearConfig(hidden_size=D, num_hidden_layers=1, **options)
    module = scrambled(modeling_kimi_linear.KimiLinearDeltaAttention(config, 0))
    gate = module.forget_gate
    values = kernels(
        memory__projection=(module.q_proj, module.k_proj, module.v_proj),
        memory__strength=module.b_proj,
        rate__inner=gate.f_a_proj,
        rate__outer=gate.f_b_proj,
        gate__inner=module.g_a_proj,
        gate__outer=module.g_b_proj,
        output=module.o_proj,
    )
    values |= {
        "memory.convolution.weight": array(module.conv1d.weight)[:, 0].T,
        "decay.log_rate": array(gate.A_log).reshape(2),
        "decay.bias": array(gate.dt_bias).reshape(2, 6),
        "gate.outer.bias": jnp.zeros(12),
        "norm.scale": array(module.o_norm.weight),
    }
    model = make("kda", heads=2, head_dim=6, epsilon=config.rms_norm_eps)
    fill(model, values)
    agree(model, module)


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_lightning_attention_of_minimax(layer):
    """Its projection is laid out by head: q, k and v of the first, of the second, ..."""
    config = MiniMaxConfig(
        hidden_size=D, num_attention_heads=4, head_dim=6, num_hidden_layers=5, block_size=32
    )
    module = scrambled(MiniMaxLightningAttention(config, layer))
    by_head = array(module.qkv_proj.weight).T.reshape(D, 4, 3, 6)
    q, k, v = (by_head[:, :, i].reshape(D, -1) for i in range(3))
    model = make("lightning_attention", heads=4, head_dim=6, layer=layer, depth=5)
    values = {"query.kernel": q, "key.kernel": k, "value.kernel": v}
    values |= kernels(gate=module.output_gate, output=module.out_proj)
    fill(model, values | {"norm.scale": array(module.norm.weight)})
    memories = []

    def theirs(x):
        y, memory = module(x, None, None)
        memories.append(memory)
        return y

    agree(model, theirs, memories)
    assert len(memories) == 1
