"""flash-linear-attention's layers on the CPU: its Triton operations replaced by its own naive ones, or by PyTorch here."""

import math

import torch
import torch.nn.functional as F
from fla.layers import (
    comba,
    delta_net,
    forgetting_attn,
    gated_deltanet,
    gated_deltaproduct,
    gla,
    hgrn2,
    kda,
    multiscale_retention,
    rwkv6,
    rwkv7,
)
from fla.models.rwkv6 import modeling_rwkv6
from fla.models.rwkv7 import modeling_rwkv7
from fla.modules import FusedRMSNormGated, GroupNorm, RMSNorm, ShortConvolution
from fla.modules.rotary import RotaryEmbedding, rotary_embedding_ref
from fla.modules.token_shift import token_shift_ref
from fla.ops.comba.naive import naive_recurrent_comba
from fla.ops.delta_rule.naive import delta_rule_recurrence
from fla.ops.forgetting_attn.naive import naive_forgetting_attn
from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence
from fla.ops.gla.naive import naive_recurrent_gla
from fla.ops.kda.gate import naive_kda_gate
from fla.ops.kda.naive import naive_recurrent_kda
from fla.ops.retention.naive import naive_retention
from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6
from fla.ops.rwkv7.gate_output_correction import gate_output_correction_ref


def rms(x, weight, epsilon):
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    return y if weight is None else y * weight


def gated_rms(self, x, gate):
    activation = torch.sigmoid if self.activation == "sigmoid" else F.silu
    return rms(x, self.weight, self.eps) * activation(gate)


def group_norm(self, x):
    if self.is_rms_norm:
        groups = x.unflatten(-1, (self.num_groups, -1))
        return rms(groups, None, self.eps).reshape(x.shape) * self.weight
    rows = x.reshape(-1, x.shape[-1])
    return F.group_norm(rows, self.num_groups, self.weight, self.bias, self.eps).reshape(x.shape)


def normed_linear(x, norm_weight, norm_bias, weight, bias):
    assert norm_bias is None
    return F.linear(rms(x, norm_weight, 1e-5), weight, bias)  # their default, which the layer leaves at that


def filtered(x, weight, bias=None, **_):
    y = F.conv1d(F.pad(x.mT, (weight.shape[-1] - 1, 0)), weight, bias, groups=x.shape[-1])
    return F.silu(y.mT)


def convolution(self, x, **_):
    return filtered(x, self.weight, self.bias), None


def rotation(self, q, k, **_):
    self._update_cos_sin_cache(q.shape[1], device=q.device, dtype=q.dtype)
    # What is cached may be longer, after an earlier call.
    cos, sin = (cached[: q.shape[1]] for cached in (self._cos_cached, self._sin_cached))
    turned = (rotary_embedding_ref(x, cos, sin) for x in (q, k))
    return tuple(turned)


def l2(x):
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def in_torch(monkeypatch):
    """Replaces the Triton parts; returns a list to which every operation appends its final memory."""
    for module, function in (
        (FusedRMSNormGated, gated_rms),
        (RMSNorm, lambda self, x: rms(x, self.weight, self.eps)),
        (GroupNorm, group_norm),
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

    def run_product(a):
        options = {"output_final_state": True}
        decay = torch.zeros_like(a["beta"]) if a["g"] is None else a["g"]
        return naive_recurrent_gated_delta_rule(l2(a["q"]), l2(a["k"]), a["v"], a["beta"], decay, **options)

    def run_comba(a):
        a = {**a, **{name: l2(a[name]) for name in "qkp"}}
        own = {name: a[name] for name in ("q", "k", "v", "p", "beta", "g")}
        return naive_recurrent_comba(**own, output_final_state=True)

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

    def run_rwkv6(a):
        options = {"scale": a["scale"], "output_final_state": True}
        o, memory = naive_recurrent_rwkv6(*by_head(a, "r", "k", "v", "w"), a["u"], **options)
        return o.transpose(1, 2), memory

    def run_rwkv7(a):
        if "kk" in a:  # one token or a few without gradients
            a = {**a, "a": -a["kk"], "b": a["kk"] * a["a"]}
        # The naive operation scales queries, RWKV-7 does not.
        scale = math.sqrt(a["r"].shape[-1])
        a = {**a, "r": scale * a["r"]}
        o, memory = dplr_recurrence(*by_head(a, "r", "k", "v", "a", "b", "w"))
        return o.transpose(1, 2), memory

    replace(gla, "chunk_gla fused_recurrent_gla", run_gla)
    replace(hgrn2, "chunk_gla fused_recurrent_gla", run_gla)
    monkeypatch.setattr(hgrn2, "swish", F.silu)
    monkeypatch.setattr(hgrn2, "rms_norm_linear", normed_linear)
    monkeypatch.setattr(
        forgetting_attn, "parallel_forgetting_attn", lambda q, k, v, g, **_: naive_forgetting_attn(q, k, v, g)
    )
    replace(delta_net, "chunk_delta_rule fused_recurrent_delta_rule", run_delta)
    replace(gated_deltanet, "chunk_gated_delta_rule fused_recurrent_gated_delta_rule", run_gated_delta)
    replace(gated_deltaproduct, "fused_recurrent_gated_delta_rule", run_product)
    replace(comba, "chunk_comba fused_recurrent_comba", run_comba)
    replace(kda, "chunk_kda fused_recurrent_kda", run_kda)
    replace(multiscale_retention, "chunk_retention fused_recurrent_retention", run_retention)
    replace(rwkv6, "chunk_rwkv6 fused_recurrent_rwkv6", run_rwkv6)
    replace(rwkv7, "chunk_rwkv7 fused_mul_recurrent_rwkv7", run_rwkv7)
    monkeypatch.setattr(
        gated_deltanet,
        "causal_conv1d",
        lambda x, weight, bias, **_: (filtered(x, weight[:, None], bias), None),
    )
    for module in (rwkv6, modeling_rwkv6):
        monkeypatch.setattr(module, "token_shift", lambda x, *_, **__: token_shift_ref(x))
    for module in (rwkv7, modeling_rwkv7):
        monkeypatch.setattr(module, "token_shift", lambda x, *_, **__: (token_shift_ref(x), None))
    monkeypatch.setattr(
        rwkv7, "fused_addcmul_rwkv7", lambda x, delta, *weights: [x + delta * w for w in weights]
    )
    monkeypatch.setattr(rwkv7, "fused_k_rwkv7", lambda k, a, k_a: k * (1 + (a - 1) * k_a))
    monkeypatch.setattr(rwkv7, "gate_output_correction", gate_output_correction_ref)
    return memories
