"""`MoE` against the sparse block and the load-balancing loss of transformers' Mixtral in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func

from layers.channel.moe import MoE, MoEConfig

WIDTH, HIDDEN, EXPERTS, TOP_K = 6, 10, 5, 2
X = np.random.default_rng(0).standard_normal((2, 9, WIDTH)).astype(np.float32)


def pair(compute):
    """Their block and ours with the same weights."""
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=WIDTH, intermediate_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K
    )
    config._experts_implementation = "eager"
    theirs = MixtralSparseMoeBlock(config).eval()
    for weight in theirs.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    options = dict(experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN, balance=1.0, z_loss=0.0, compute=compute)
    ours = MoE(MoEConfig(WIDTH, **options), rngs=nnx.Rngs(0))

    def copy(tensor):
        return jnp.asarray(tensor.detach().numpy())

    ours.router.kernel[...] = copy(theirs.gate.weight.T)
    both = theirs.experts.gate_up_proj.mT
    ours.gate[...], ours.up[...] = copy(both[..., :HIDDEN]), copy(both[..., HIDDEN:])
    ours.down[...] = copy(theirs.experts.down_proj.mT)
    return theirs, ours


@pytest.mark.parametrize("compute", ["grouped", "dense"])
def test_outputs_and_gradients(compute):
    """To 1e-5 of the largest value: outputs, and the gradients of the input and of every weight."""
    theirs, ours = pair(compute)
    x = torch.tensor(X, requires_grad=True)
    weights = np.cos(np.arange(X.size, dtype=np.float32)).reshape(X.shape)
    y = theirs(x)
    (y * torch.tensor(weights)).sum().backward()
    graph, params, rest = nnx.split(ours, nnx.Param, ...)

    def loss(params, x):
        y = nnx.merge(graph, params, rest, copy=True)(x)
        return jnp.sum(y * weights), y

    (gradients, by_input), got = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, jnp.asarray(X))
    by_gate_up = theirs.experts.gate_up_proj.grad.mT
    pairs = [
        (got, y.detach()),
        (by_input, x.grad),
        (gradients["router"]["kernel"][...], theirs.gate.weight.grad.T),
        (gradients["gate"][...], by_gate_up[..., :HIDDEN]),
        (gradients["up"][...], by_gate_up[..., HIDDEN:]),
        (gradients["down"][...], theirs.experts.down_proj.grad.mT),
    ]
    for one, other in pairs:
        other = other.numpy()
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


def test_the_balance_of_real_tokens():
    """Theirs counts choices without dividing by top_k, so that it is top_k times ours."""
    theirs, ours = pair("dense")
    mask = np.arange(9)[None] < np.array([[9], [4]])
    logits = torch.nn.functional.linear(torch.tensor(X).reshape(-1, WIDTH), theirs.gate.weight)
    want = load_balancing_loss_func((logits,), EXPERTS, TOP_K, torch.tensor(mask).long())
    ours(jnp.asarray(X), mask=jnp.asarray(mask), key=jax.random.key(0))
    np.testing.assert_allclose(TOP_K * ours.auxiliary[...], want.item(), rtol=1e-5)
