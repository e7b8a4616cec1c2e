"""`selective_scan` and `short_conv` against transformers' Mamba in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.mamba.configuration_mamba import MambaConfig
from transformers.models.mamba.modeling_mamba import (
    MambaMixer,
    causal_conv1d_fn,
    causal_conv1d_update,
    mamba_selective_scan,
    mamba_selective_state_update,
)

from layers.kernels.selective_scan import selective_scan
from layers.kernels.short_conv import short_conv

B, T, D, N = 2, 45, 6, 4
implementations = pytest.mark.parametrize("impl", ["xla", "reference"])


def draw(**shapes):
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def scan_arguments():
    arguments = draw(x=(B, T, D), dt=(B, T, D), a=(D, N), b=(B, T, 1, N), c=(B, T, 1, N))
    return {**arguments, **draw(skip=(D,), gate=(B, T, D), dt_bias=(D,)), "a": -np.exp(arguments["a"])}


def close(got, want):
    got, want = np.asarray(got), want.detach().numpy()
    assert got.shape == want.shape
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error <= 1e-5, f"relative error {error:.1e}"


def agree(ours, theirs, arguments):
    """Compares outputs, final states, and the gradients of every argument."""
    tensors = {name: torch.tensor(v, requires_grad=True) for name, v in arguments.items()}
    their_outputs = theirs(**tensors)
    rng = np.random.default_rng(1)
    weights = [rng.standard_normal(v.shape).astype(np.float32) for v in their_outputs]
    sum((v * torch.tensor(w)).sum() for v, w in zip(their_outputs, weights, strict=True)).backward()

    def loss(arguments):
        outputs = ours(**arguments)
        return sum((v * w).sum() for v, w in zip(outputs, weights, strict=True)), outputs

    gradients, outputs = jax.grad(loss, has_aux=True)(jax.tree.map(jnp.asarray, arguments))
    for got, want in zip(outputs, their_outputs, strict=True):
        close(got, want)
    for name, tensor in tensors.items():
        close(gradients[name], tensor.grad)


@implementations
def test_scan_and_its_gradients(impl):
    def theirs(x, dt, a, b, c, skip, gate, dt_bias):
        x, dt, gate = (v.transpose(1, 2) for v in (x, dt, gate))
        # Their B and C are (b, n, t).
        b, c = (v[:, :, 0].transpose(1, 2) for v in (b, c))
        y, state = mamba_selective_scan(
            x, dt, a, b, c, skip, gate, dt_bias, delta_softplus=True, return_last_state=True
        )
        return y.transpose(1, 2), state

    def ours(x, dt, a, b, c, **options):
        return selective_scan(x, dt, a, b, c, **options, dt_softplus=True, impl=impl)

    agree(ours, theirs, scan_arguments())


@implementations
def test_scan_one_step_after_a_state(impl):
    arguments = scan_arguments()
    step = {k: v[:, :1] if v.ndim > 2 else v for k, v in arguments.items()}
    state = draw(state=(B, D, N))["state"]
    theirs_state = torch.tensor(state)
    tensors = {k: torch.tensor(v) for k, v in step.items()}
    theirs = mamba_selective_state_update(
        theirs_state,
        tensors["x"][:, 0],
        tensors["dt"][:, 0],
        tensors["a"],
        tensors["b"][:, 0, 0],
        tensors["c"][:, 0, 0],
        tensors["skip"],
        tensors["dt_bias"],
        dt_softplus=True,
        z=tensors["gate"][:, 0],
    )
    step = jax.tree.map(jnp.asarray, step)
    y, final = selective_scan(**step, dt_softplus=True, initial_state=jnp.asarray(state), impl=impl)
    close(y[:, 0], theirs)
    close(final, theirs_state)


@implementations
@pytest.mark.parametrize("activation", [None, "silu"])
def test_convolution_and_its_gradients(impl, activation):
    def theirs(x, weight, bias):
        return (causal_conv1d_fn(x.transpose(1, 2), weight.T, bias, activation).transpose(1, 2),)

    def ours(x, weight, bias):
        return short_conv(x, weight, bias, activation=activation, impl=impl)[:1]

    agree(ours, theirs, draw(x=(B, T, D), weight=(4, D), bias=(D,)))


@implementations
def test_convolution_after_a_state(impl):
    arguments = draw(x=(B, 5, D), weight=(4, D), bias=(D,), state=(B, 3, D))
    x, weight, bias, state = (torch.tensor(v) for v in arguments.values())
    state = state.transpose(1, 2).contiguous()
    theirs = causal_conv1d_update(x.transpose(1, 2), state, weight.T.contiguous(), bias, "silu")
    x, weight, bias, initial = (jnp.asarray(v) for v in arguments.values())
    y, final = short_conv(x, weight, bias, activation="silu", initial_state=initial, impl=impl)
    close(y, theirs.transpose(1, 2))
    close(final, state.transpose(1, 2))


@implementations
def test_mamba_layer(impl):
    """The two primitives put together as the layer of the paper, with the layer's own weights."""
    torch.manual_seed(0)
    config = MambaConfig(hidden_size=8, state_size=N, expand=2, conv_kernel=4, time_step_rank=3)
    layer = MambaMixer(config, layer_idx=0)
    u = draw(u=(B, T, 8))["u"]
    want = layer(torch.tensor(u))
    p = {name: jnp.asarray(v.detach().numpy()) for name, v in layer.named_parameters()}
    x, gate = jnp.split(u @ p["in_proj.weight"].T, 2, axis=-1)
    x, _ = short_conv(x, p["conv1d.weight"][:, 0].T, p["conv1d.bias"], activation="silu", impl=impl)
    dt, b, c = jnp.split(x @ p["x_proj.weight"].T, [3, 3 + N], axis=-1)
    y, _ = selective_scan(
        x,
        dt @ p["dt_proj.weight"].T,
        -jnp.exp(p["A_log"]),
        b[:, :, None],
        c[:, :, None],
        skip=p["D"],
        gate=gate,
        dt_bias=p["dt_proj.bias"],
        dt_softplus=True,
        impl=impl,
    )
    close(y @ p["out_proj.weight"].T, want[0] if isinstance(want, tuple) else want)
