"""The delta rules against flash-linear-attention's naive modules and transformers' models, in PyTorch."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from fla.ops.delta_rule.naive import delta_rule_recurrence
from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence
from fla.ops.kda.naive import naive_recurrent_kda
from transformers.models.kimi_linear.modeling_kimi_linear import recurrent_kimi_delta_attention
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

from layers.kernels.delta_rule import delta_rule, dplr_delta_rule

B, T, H, K, V = 2, 70, 4, 8, 6
implementations = pytest.mark.parametrize("impl", ["xla", "reference"])


def draw(groups=H):
    """Keys of norm 1 and writing strengths below 1, which keep the state bounded."""
    rng = np.random.default_rng(0)
    k = rng.standard_normal((B, T, groups, K))
    arguments = {
        "q": rng.standard_normal((B, T, groups, K)),
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": rng.standard_normal((B, T, H, V)),
        "beta": rng.uniform(0, 1, (B, T, H)),
        "initial_state": rng.standard_normal((B, H, K, V)),
    }
    return {name: x.astype(np.float32) for name, x in arguments.items()}


def log_decay(*shape):
    return -np.random.default_rng(2).gamma(1, 1, shape).astype(np.float32)


def close(got, want):
    got, want = np.asarray(got), want.detach().numpy()
    assert got.shape == want.shape
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error <= 1e-5, f"relative error {error:.1e}"


def agree(ours, theirs, arguments):
    """Compares outputs, final states, and the gradients of every argument."""
    tensors = {name: torch.tensor(x, requires_grad=True) for name, x in arguments.items()}
    their_outputs = theirs(**tensors)
    rng = np.random.default_rng(1)
    weights = [rng.standard_normal(x.shape).astype(np.float32) for x in their_outputs]
    sum((x * torch.tensor(w)).sum() for x, w in zip(their_outputs, weights, strict=True)).backward()

    def loss(arguments):
        outputs = ours(**arguments)
        return sum((x * w).sum() for x, w in zip(outputs, weights, strict=True)), outputs

    gradients, outputs = jax.jit(jax.grad(loss, has_aux=True))(jax.tree.map(jnp.asarray, arguments))
    for got, want in zip(outputs, their_outputs, strict=True):
        close(got, want)
    for name, tensor in tensors.items():
        close(gradients[name], tensor.grad)


def by_head(*tensors):
    return (x.transpose(1, 2) for x in tensors)


@implementations
def test_delta_rule(impl):
    def theirs(q, k, v, beta, initial_state):
        o, state = delta_rule_recurrence(*by_head(q, k, v, beta), initial_state)
        return o.transpose(1, 2), state

    agree(lambda **x: delta_rule(**x, impl=impl), theirs, draw())


@implementations
def test_gated_delta_rule(impl):
    def theirs(q, k, v, beta, log_decay, initial_state):
        return naive_recurrent_gated_delta_rule(
            q, k, v, beta, log_decay, initial_state=initial_state, output_final_state=True
        )

    agree(lambda **x: delta_rule(**x, impl=impl), theirs, draw() | {"log_decay": log_decay(B, T, H)})


@implementations
def test_gated_delta_rule_of_qwen3_next(impl):
    """Fewer key heads than value heads, normalised inside. The plain PyTorch code, not what else is installed."""
    function = inspect.unwrap(torch_recurrent_gated_delta_rule)

    def theirs(q, k, v, beta, log_decay, initial_state):
        return function(q, k, v, log_decay, beta, initial_state, True, use_qk_l2norm_in_kernel=True)

    arguments = draw(groups=2) | {"log_decay": log_decay(B, T, H)}
    arguments["k"] = 3 * arguments["k"]
    agree(lambda **x: delta_rule(**x, normalize_qk=True, impl=impl), theirs, arguments)


@implementations
@pytest.mark.parametrize("groups", [2, H])
def test_kimi_delta_attention(impl, groups):
    def theirs(q, k, v, beta, log_decay, initial_state):
        return naive_recurrent_kda(
            q, k, v, log_decay, beta, initial_state=initial_state, output_final_state=True
        )

    arguments = draw(groups) | {"log_decay": log_decay(B, T, H, K)}
    agree(lambda **x: delta_rule(**x, impl=impl), theirs, arguments)


@implementations
def test_kimi_delta_attention_of_kimi_linear(impl):
    function = inspect.unwrap(recurrent_kimi_delta_attention)

    def theirs(q, k, v, beta, log_decay, initial_state):
        return function(q, k, v, log_decay, beta, initial_state, True, use_qk_l2norm_in_kernel=True)

    arguments = draw() | {"log_decay": log_decay(B, T, H, K)}
    arguments["k"] = 3 * arguments["k"]
    agree(lambda **x: delta_rule(**x, normalize_qk=True, impl=impl), theirs, arguments)


@implementations
def test_general_rule(impl):
    arguments = draw() | {"log_decay": log_decay(B, T, H, K)}
    rng = np.random.default_rng(3)
    a, b = arguments["k"], arguments.pop("beta")[..., None] * arguments["k"]
    arguments |= {"a": -a, "b": b, "k": rng.standard_normal((B, T, H, K)).astype(np.float32)}

    def theirs(q, k, v, a, b, log_decay, initial_state):
        o, state = dplr_recurrence(*by_head(q, k, v, a, b, log_decay), initial_state)
        return o.transpose(1, 2), state

    agree(lambda **x: dplr_delta_rule(**x, impl=impl), theirs, arguments)


@implementations
def test_rwkv7(impl):
    """The recurrence as RWKV-7 writes it, S (v, k) from the right: S (Diag(w) - kappa^T (a kappa)) + v k^T, o = S r."""
    arguments = draw()
    del arguments["beta"]
    rng = np.random.default_rng(3)
    arguments["eta"] = rng.uniform(0, 1, (B, T, H, K)).astype(np.float32)
    arguments["kappa"] = arguments["k"][:, ::-1].copy()
    arguments["log_decay"] = (-np.exp(-0.5) * rng.uniform(0, 1, (B, T, H, K))).astype(np.float32)

    def theirs(q, k, v, eta, kappa, log_decay, initial_state):
        state, outputs = initial_state.transpose(2, 3), []
        for t in range(T):
            removed = state @ kappa[:, t, :, :, None]
            state = state * log_decay[:, t].exp()[:, :, None] - removed * (eta * kappa)[:, t, :, None]
            state = state + v[:, t, ..., None] * k[:, t, :, None]
            outputs.append((state @ q[:, t, ..., None])[..., 0])
        return torch.stack(outputs, 1), state.transpose(2, 3)

    def ours(eta, kappa, **rest):
        return dplr_delta_rule(**rest, a=-kappa, b=eta * kappa, scale=1.0, impl=impl)

    agree(ours, theirs, arguments)
