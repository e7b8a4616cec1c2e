"""`gated_linear_attention` against flash-linear-attention's naive modules and transformers' models, in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from fla.ops.gla.naive import naive_recurrent_gla
from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
from fla.ops.retention.naive import naive_retention
from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6
from fla.ops.simple_gla.naive import naive_recurrent_simple_gla
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.minimax.configuration_minimax import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

from layers.kernels.gated_linear_attention import gated_linear_attention

B, T, H, K, V = 2, 70, 4, 8, 6
implementations = pytest.mark.parametrize("impl", ["xla", "reference"])


def draw(**shapes):
    rng = np.random.default_rng(0)
    sizes = {"q": (B, T, H, K), "k": (B, T, H, K), "v": (B, T, H, V), "initial_state": (B, H, K, V)} | shapes
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in sizes.items()}


def close(got, want):
    got, want = np.asarray(got), want.detach().numpy()
    assert got.shape == want.shape
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error <= 2e-5, f"relative error {error:.1e}"


def agree(ours, theirs, arguments):
    """Compares outputs, final states, and the gradients of every argument."""
    tensors = {name: torch.tensor(x, requires_grad=True) for name, x in arguments.items()}
    their_o, their_state = theirs(**tensors)
    rng = np.random.default_rng(1)
    weights = [rng.standard_normal(x.shape).astype(np.float32) for x in (their_o, their_state)]
    sum((x * torch.tensor(w)).sum() for x, w in zip((their_o, their_state), weights, strict=True)).backward()

    def loss(arguments):
        outputs = ours(**arguments)
        return sum((x * w).sum() for x, w in zip(outputs, weights, strict=True)), outputs

    gradients, (o, state) = jax.grad(loss, has_aux=True)(jax.tree.map(jnp.asarray, arguments))
    close(o, their_o)
    close(state, their_state)
    for name, tensor in tensors.items():
        close(gradients[name], tensor.grad)


@implementations
def test_gla(impl):
    arguments = draw()
    arguments["log_decay"] = -np.random.default_rng(2).gamma(1, 2, (B, T, H, K)).astype(np.float32)

    def theirs(log_decay, initial_state, **tokens):
        return naive_recurrent_gla(
            **tokens, gk=log_decay, initial_state=initial_state, output_final_state=True
        )

    agree(lambda **x: gated_linear_attention(**x, impl=impl), theirs, arguments)


@implementations
def test_simple_gla(impl):
    arguments = draw()
    arguments["log_decay"] = -np.random.default_rng(2).gamma(1, 2, (B, T, H)).astype(np.float32)

    def theirs(log_decay, **rest):
        o, state = naive_recurrent_simple_gla(**rest, g=log_decay)
        return o, state

    agree(lambda **x: gated_linear_attention(**x, impl=impl), theirs, arguments)


@implementations
def test_rwkv6(impl):
    arguments = draw(bonus=(H, K))
    arguments["log_decay"] = -np.random.default_rng(2).gamma(1, 2, (B, T, H, K)).astype(np.float32)

    def theirs(q, k, v, log_decay, bonus, initial_state):
        by_head = (x.transpose(1, 2) for x in (q, k, v, log_decay))
        o, state = naive_recurrent_rwkv6(
            *by_head, bonus, scale=1.0, initial_state=initial_state, output_final_state=True
        )
        return o.transpose(1, 2), state

    agree(lambda **x: gated_linear_attention(**x, scale=1.0, impl=impl), theirs, arguments)


@implementations
def test_retention(impl):
    arguments = draw()
    q, k, v = (jnp.asarray(arguments[name]) for name in "qkv")
    theirs = naive_retention(*(torch.tensor(arguments[name]).transpose(1, 2) for name in "qkv")).transpose(
        1, 2
    )
    log_decay = np.log1p(-(2.0 ** (-5.0 - np.arange(H)))).astype(np.float32)
    o, _ = gated_linear_attention(q, k, v, log_decay=jnp.asarray(log_decay), impl=impl)
    close(o, theirs)


@implementations
def test_normalized_linear_attention(impl):
    arguments = draw()
    for name in "qk":
        arguments[name] = np.where(arguments[name] > 0, arguments[name] + 1, np.exp(arguments[name]))
    sums = np.abs(arguments["initial_state"][..., :1])
    arguments["initial_state"] = np.concatenate([arguments["initial_state"], sums], axis=-1)

    def theirs(q, k, v, initial_state):
        state = initial_state[..., :-1], initial_state[..., -1][:, None]
        o, (kv, z) = naive_recurrent_linear_attn(
            q, k, v, initial_state=state, output_final_state=True, normalize=True
        )
        return o, torch.cat([kv, z[:, 0, :, :, None]], dim=-1)

    agree(lambda **x: gated_linear_attention(**x, normalize=True, impl=impl), theirs, arguments)


@implementations
@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2(impl, groups):
    """C, B and dt x in the places of queries, keys and values; a group of B and C serves several heads."""
    arguments = draw(q=(B, T, groups, K), k=(B, T, groups, K))
    arguments["dt"] = np.random.default_rng(2).gamma(1, 0.5, (B, T, H)).astype(np.float32)
    arguments["a"] = -np.linspace(1, 16, H, dtype=np.float32)

    def theirs(q, k, v, dt, a, initial_state):
        o, state = mamba2_chunk_scan(
            v, dt, a, k, q, 32, initial_states=initial_state.transpose(2, 3), return_final_states=True
        )
        return o, state.transpose(2, 3)

    def ours(q, k, v, dt, a, initial_state):
        return gated_linear_attention(
            q,
            k,
            v * dt[..., None],
            log_decay=dt * a[None, None],
            scale=1.0,
            initial_state=initial_state,
            impl=impl,
        )

    agree(ours, theirs, arguments)


@implementations
@pytest.mark.parametrize("layer", [0, 2])
def test_lightning_attention_of_minimax(impl, layer):
    torch.manual_seed(0)
    config = MiniMaxConfig(
        hidden_size=H * K,
        num_attention_heads=H,
        num_hidden_layers=3,
        head_dim=K,
        block_size=16,
        layer_types=["linear_attention"] * 3,
    )
    module = MiniMaxLightningAttention(config, layer)
    x = torch.randn(B, T, H * K)
    with torch.no_grad():
        theirs = module(x, position_embeddings=None, attention_mask=None)[0]
        tokens = module.act_fn(module.qkv_proj(x)).reshape(B, T, H, 3, K).numpy()
        slope = 2.0 ** (-8 / H * np.arange(1, H + 1)) * (1 - layer / (2 + 1e-5) + 1e-5)
        q, k, v = (jnp.asarray(tokens[..., i, :]) for i in range(3))
        log_decay = jnp.asarray(-slope, jnp.float32)
        o, _ = gated_linear_attention(q, k, v, log_decay=log_decay, scale=1.0, impl=impl)
        o = module.norm(torch.tensor(np.asarray(o)).reshape(B, T, H * K))
        close(module.out_proj(torch.sigmoid(module.output_gate(x)) * o).numpy(), theirs)


@implementations
def test_rwkv4_with_moderate_keys(impl):
    """Every channel is a head of width 1 with the feature exp(key); larger keys need a running maximum."""
    rng = np.random.default_rng(0)
    key, value = (rng.standard_normal((B, T, 5)).astype(np.float32) for _ in range(2))
    decay, first = (rng.standard_normal(5).astype(np.float32) for _ in range(2))
    theirs, _ = rwkv_linear_attention_cpu(*map(torch.tensor, (decay, first, key, value)))
    o, _ = gated_linear_attention(
        jnp.ones((B, T, 1, 1)),
        jnp.exp(key)[..., None],
        jnp.asarray(value)[..., None],
        log_decay=-jnp.exp(decay),
        bonus=jnp.exp(first)[:, None],
        normalize=True,
        impl=impl,
    )
    close(o[..., 0], theirs)
