"""Mixers with a matrix memory against layers of flash-linear-attention and transformers, weights copied over.

flash-linear-attention: GatedLinearAttention, MultiScaleRetention, DeltaNet, GatedDeltaNet, KimiDeltaAttention and
RWKV7Attention (the first layer), with its Triton operations replaced by its own naive ones where it has them, and by the
PyTorch functions of the same name below for norms, convolutions, rotations and token shift. The naive linear attention,
too. transformers: the layers of Qwen3-Next, Kimi Linear and MiniMax.

Outputs and gradients of the input to a relative 2e-5; the mixer is also run in two pieces with its state, and its last
memory is compared where the other side gives one.
"""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fla.layers import delta_net, gated_deltanet, gla, kda, multiscale_retention, rwkv7
from fla.modules import FusedRMSNormGated, RMSNorm, ShortConvolution
from fla.modules.rotary import RotaryEmbedding, rotary_embedding_ref
from fla.modules.token_shift import token_shift_ref
from fla.ops.delta_rule.naive import delta_rule_recurrence
from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence
from fla.ops.gla.naive import naive_recurrent_gla
from fla.ops.kda.gate import naive_kda_gate
from fla.ops.kda.naive import naive_recurrent_kda
from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
from fla.ops.retention.naive import naive_retention
from fla.ops.rwkv7.gate_output_correction import gate_output_correction_ref
from flax import nnx
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig
from transformers.models.minimax.configuration_minimax import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
from transformers.models.qwen3_next import modeling_qwen3_next
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig

from layers.mixers import make_mixer

B, T, D = 2, 70, 16


# What flash-linear-attention computes in Triton.
def rms(x, weight, epsilon):
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    return y if weight is None else y * weight


def gated_rms(self, x, gate):
    activation = torch.sigmoid if self.activation == "sigmoid" else F.silu
    return rms(x, self.weight, self.eps) * activation(gate)


def filtered(x, weight, bias=None, **_):
    y = F.conv1d(F.pad(x.mT, (weight.shape[-1] - 1, 0)), weight, bias, groups=x.shape[-1])
    return F.silu(y.mT)


def convolution(self, x, **_):
    return filtered(x, self.weight, self.bias), None


def rotation(self, q, k, **_):
    self._update_cos_sin_cache(q.shape[1], device=q.device, dtype=q.dtype)
    turned = (rotary_embedding_ref(x, self._cos_cached, self._sin_cached) for x in (q, k))
    return tuple(turned)


def l2(x):
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


@pytest.fixture
def plain(monkeypatch):
    """Replaces the Triton parts; returns a list to which every operation appends its final memory."""
    for module, function in (
        (FusedRMSNormGated, gated_rms),
        (RMSNorm, lambda self, x: rms(x, self.weight, self.eps)),
        (ShortConvolution, convolution),
        (RotaryEmbedding, rotation),
    ):
        monkeypatch.setattr(module, "forward", function)
    memories = []

    def replace(module, names, operation):
        def run(**arguments):
            o, memory = operation(arguments)
            memories.append(memory)
            return o, memory

        for name in names.split():
            monkeypatch.setattr(module, name, run)

    def by_head(a, *names):
        return [a[name].transpose(1, 2) for name in names]

    def run_gla(a):
        gate = a["g"] if "g" in a else a["gk"]
        return naive_recurrent_gla(a["q"], a["k"], a["v"], gate, output_final_state=True)

    def run_delta(a):
        q, k, v, beta = by_head({**a, "q": l2(a["q"]), "k": l2(a["k"])}, "q", "k", "v", "beta")
        o, memory = delta_rule_recurrence(q, k, v, beta)
        return o.transpose(1, 2), memory

    def strength(a):
        return torch.sigmoid(a["beta"]) * (2 if a["allow_neg_eigval"] else 1)

    def run_gated_delta(a):
        decay = -a["A_log"].exp() * F.softplus(a["g"] + a["dt_bias"])
        # The naive operation wants as many heads of queries and keys as of values.
        q, k = (l2(a[name]).repeat_interleave(a["v"].shape[2] // a[name].shape[2], 2) for name in "qk")
        options = {"output_final_state": True}
        return naive_recurrent_gated_delta_rule(q, k, a["v"], strength(a), decay, **options)

    def run_kda(a):
        decay = naive_kda_gate(a["g"], a["A_log"], a["dt_bias"])
        options = {"output_final_state": True}
        return naive_recurrent_kda(l2(a["q"]), l2(a["k"]), a["v"], decay, strength(a), **options)

    def run_retention(a):
        return naive_retention(*by_head(a, "q", "k", "v")).transpose(1, 2), None

    def run_rwkv7(a):
        # The naive operation scales queries, RWKV-7 does not.
        scale = math.sqrt(a["r"].shape[-1])
        a = {**a, "r": scale * a["r"]}
        o, memory = dplr_recurrence(*by_head(a, "r", "k", "v", "a", "b", "w"))
        return o.transpose(1, 2), memory

    replace(gla, "chunk_gla fused_recurrent_gla", run_gla)
    replace(delta_net, "chunk_delta_rule fused_recurrent_delta_rule", run_delta)
    replace(gated_deltanet, "chunk_gated_delta_rule fused_recurrent_gated_delta_rule", run_gated_delta)
    replace(kda, "chunk_kda fused_recurrent_kda", run_kda)
    replace(multiscale_retention, "chunk_retention fused_recurrent_retention", run_retention)
    replace(rwkv7, "chunk_rwkv7", run_rwkv7)
    monkeypatch.setattr(
        gated_deltanet,
        "causal_conv1d",
        lambda x, weight, bias, **_: (filtered(x, weight[:, None], bias), None),
    )
    monkeypatch.setattr(rwkv7, "token_shift", lambda x, *_, **__: (token_shift_ref(x), None))
    monkeypatch.setattr(
        rwkv7, "fused_addcmul_rwkv7", lambda x, delta, *weights: [x + delta * w for w in weights]
    )
    monkeypatch.setattr(rwkv7, "fused_k_rwkv7", lambda k, a, k_a: k * (1 + (a - 1) * k_a))
    monkeypatch.setattr(rwkv7, "gate_output_correction", gate_output_correction_ref)
    return memories


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


def convolved(module):
    """What all layers with a short convolution share."""
    convolutions = (module.q_conv1d, module.k_conv1d, module.v_conv1d)
    taps = jnp.concatenate([array(c.weight)[:, 0].T for c in convolutions], axis=1)
    return {"memory.convolution.weight": taps} | kernels(
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
        close(state.memory, memory)


def make(name, **options):
    return make_mixer(name, options, given={"width": D}, rngs=nnx.Rngs(0))


def test_gla(plain):
    module = scrambled(gla.GatedLinearAttention(hidden_size=D, num_heads=2, gate_low_rank_dim=3))
    model = make("gla", heads=2, gate_rank=3)
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
    fill(model, values | {"norm.scale": array(module.g_norm_swish_gate.weight)})
    agree(model, module, plain)
    assert len(plain) == 1


def test_retention(plain):
    module = scrambled(multiscale_retention.MultiScaleRetention(hidden_size=D, num_heads=2))
    # Its frequencies are those of plain rotary positions.
    size = D // 2
    model = make("retnet", heads=2, affine=True, epsilon=1e-5, rope_base=10_000.0 ** ((size - 2) / size))
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


@pytest.mark.parametrize("negative", [False, True])
def test_kimi_delta_attention(plain, negative):
    module = kda.KimiDeltaAttention(hidden_size=D, num_heads=2, head_dim=6, allow_neg_eigval=negative)
    values = convolved(scrambled(module)) | kernels(
        rate__inner=module.f_proj[0],
        rate__outer=module.f_proj[1],
        gate__inner=module.g_proj[0],
        gate__outer=module.g_proj[1],
        output=module.o_proj,
    )
    values |= {"decay.log_rate": array(module.A_log), "decay.bias": array(module.dt_bias).reshape(2, 6)}
    values |= {"gate.outer.bias": array(module.g_proj[1].bias)}
    model = make("kda", heads=2, head_dim=6, negative_eigenvalues=negative)
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
