"""`MoE` against blocks of transformers in PyTorch, weights copied over.

Mixtral: the experts, and the load-balancing loss. DeepSeek-V3: sigmoids, the bias, groups, scale and shared experts.
Qwen3-Next: the gated shared expert. Outputs and all gradients to 1e-5 of the largest value.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextSparseMoeBlock

from layers.channel.moe import MoE, MoEConfig

WIDTH, HIDDEN, TOP_K = 6, 10, 2
X = np.random.default_rng(0).standard_normal((2, 9, WIDTH)).astype(np.float32)
SIZES = {"hidden_size": WIDTH, "moe_intermediate_size": HIDDEN, "num_experts_per_tok": TOP_K}


def by_our_names(block, of=lambda parameter: parameter):
    """`of` their parameters, laid out as ours."""
    both = of(block.experts.gate_up_proj).mT
    values = {
        "router.kernel": of(block.gate.weight).T,
        "gate": both[..., :HIDDEN],
        "up": both[..., HIDDEN:],
        "down": of(block.experts.down_proj).mT,
    }
    shared = getattr(block, "shared_experts", getattr(block, "shared_expert", None))
    if shared is not None:
        for name in ("gate", "up", "down"):
            values[f"shared.{name}.kernel"] = of(getattr(shared, f"{name}_proj").weight).T
    if hasattr(block, "shared_expert_gate"):
        values["shared_gate.kernel"] = of(block.shared_expert_gate.weight).T
    return {name: value.detach().numpy() for name, value in values.items()}


def named(state):
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def pair(block, config, **options):
    """Their block and ours with the same weights."""
    torch.manual_seed(0)
    config._experts_implementation = "eager"
    theirs = block(config).eval()
    for weight in theirs.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    ours = MoE(MoEConfig(WIDTH, hidden=HIDDEN, top_k=TOP_K, **options), rngs=nnx.Rngs(0))
    variables, values = named(nnx.state(ours, nnx.Param)), by_our_names(theirs)
    assert set(variables) == set(values)
    for name, variable in variables.items():
        assert variable.shape == values[name].shape
        variable[...] = jnp.asarray(values[name])
    return theirs, ours


def mixtral(compute):
    sizes = dict(hidden_size=WIDTH, intermediate_size=HIDDEN, num_local_experts=5, num_experts_per_tok=TOP_K)
    options = dict(experts=5, balance=1.0, z_loss=0.0, compute=compute)
    return pair(MixtralSparseMoeBlock, MixtralConfig(**sizes), **options)


def deepseek_v3(compute):
    groups = dict(n_group=3, topk_group=2, n_routed_experts=6, n_shared_experts=2, routed_scaling_factor=2.5)
    options = dict(experts=6, shared=2, groups=3, top_groups=2, scores="sigmoid", scale=2.5, bias_rate=0.001)
    theirs, ours = pair(DeepseekV3MoE, DeepseekV3Config(**SIZES, **groups), compute=compute, **options)
    bias = 0.3 * np.random.default_rng(1).standard_normal(6).astype(np.float32)
    theirs.gate.e_score_correction_bias.copy_(torch.tensor(bias))
    ours.bias[...] = jnp.asarray(bias)
    return theirs, ours


def qwen3_next(compute):
    config = Qwen3NextConfig(
        num_experts=5, shared_expert_intermediate_size=HIDDEN, norm_topk_prob=True, **SIZES
    )
    return pair(Qwen3NextSparseMoeBlock, config, experts=5, shared=1, shared_gate=True, compute=compute)


@pytest.mark.parametrize("compute", ["grouped", "dense"])
@pytest.mark.parametrize("block", [mixtral, deepseek_v3, qwen3_next])
def test_outputs_and_gradients(block, compute):
    """Outputs, and the gradients of the input and of every weight."""
    theirs, ours = block(compute)
    x = torch.tensor(X, requires_grad=True)
    weights = np.cos(np.arange(X.size, dtype=np.float32)).reshape(X.shape)
    y = theirs(x)
    (y * torch.tensor(weights)).sum().backward()
    graph, params, rest = nnx.split(ours, nnx.Param, ...)

    def loss(params, x):
        y = nnx.merge(graph, params, rest, copy=True)(x)
        return jnp.sum(y * weights), y

    (gradients, by_input), got = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, jnp.asarray(X))
    want = by_our_names(theirs, lambda parameter: parameter.grad)
    pairs = [(got, y.detach().numpy()), (by_input, x.grad.numpy())]
    pairs += [(gradient[...], want[name]) for name, gradient in named(gradients).items()]
    for one, other in pairs:
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


def test_the_balance_of_real_tokens():
    """Theirs counts choices without dividing by top_k, so that it is top_k times ours."""
    theirs, ours = mixtral("dense")
    mask = np.arange(9)[None] < np.array([[9], [4]])
    logits = torch.nn.functional.linear(torch.tensor(X).reshape(-1, WIDTH), theirs.gate.weight)
    want = load_balancing_loss_func((logits,), 5, TOP_K, torch.tensor(mask).long())
    ours(jnp.asarray(X), mask=jnp.asarray(mask), key=jax.random.key(0))
    np.testing.assert_allclose(TOP_K * ours.auxiliary[...], want.item(), rtol=1e-5)
