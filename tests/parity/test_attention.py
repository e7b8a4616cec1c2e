"""`attention` against PyTorch's fused and flexible attention and the eager attention of transformers' models."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss

from layers.kernels.attention import Logits, Mask, attention, attention_with_lse

B, T, H, G, D = 2, 70, 4, 2, 16
SEGMENTS = np.array([[1] * 30 + [2] * 40, [1] * 50 + [2] * 5 + [3] * 15])


def draw():
    rng = np.random.default_rng(0)
    shapes = {"q": (B, T, H, D), "k": (B, T, G, D), "v": (B, T, G, D)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def heads_first(arguments, grad=False):
    """(b, t, h, d) arrays as (b, h, t, d) tensors."""
    return [torch.tensor(x.swapaxes(1, 2).copy(), requires_grad=grad) for x in arguments.values()]


def close(got, want):
    np.testing.assert_allclose(np.asarray(got), want.detach().numpy(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("impl", ["xla", "reference"])
@pytest.mark.parametrize("causal", [True, False])
def test_scaled_dot_product_attention_and_its_gradients(impl, causal):
    arguments = draw()
    weights = np.random.default_rng(1).standard_normal((B, T, H, D)).astype(np.float32)
    tensors = heads_first(arguments, grad=True)
    theirs = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=causal, enable_gqa=True)
    theirs = theirs.transpose(1, 2)
    (theirs * torch.tensor(weights)).sum().backward()

    def loss(arguments):
        output = attention(**arguments, causal=causal, impl=impl)
        return (output * weights).sum(), output

    gradients, output = jax.grad(loss, has_aux=True)(jax.tree.map(jnp.asarray, arguments))
    close(output, theirs)
    for name, tensor in zip(arguments, tensors, strict=True):
        close(gradients[name], tensor.grad.transpose(1, 2))


SLOPES = 2.0 ** -np.arange(1, H + 1, dtype=np.float32)
PREFIX = np.array([5, 40])
segments, prefix, slopes = torch.tensor(SEGMENTS), torch.tensor(PREFIX), torch.tensor(SLOPES)


@pytest.mark.parametrize("impl", ["xla", "reference"])
@pytest.mark.parametrize(
    "options, seen, score",
    [
        ({"causal": True, "mask": Mask(window=9)}, lambda b, h, i, j: (j <= i) & (i - j < 9), None),
        ({"mask": Mask(window=9)}, lambda b, h, i, j: (i - j).abs() <= 9, None),
        (
            {"causal": True, "mask": Mask(window=9, sink_tokens=3)},
            lambda b, h, i, j: (j <= i) & ((i - j < 9) | (j < 3)),
            None,
        ),
        (
            {"causal": True, "mask": Mask(prefix_lengths=jnp.asarray(PREFIX))},
            lambda b, h, i, j: (j <= i) | ((i < prefix[b]) & (j < prefix[b])),
            None,
        ),
        (
            {"causal": True, "segment_ids": SEGMENTS},
            lambda b, h, i, j: (j <= i) & (segments[b, i] == segments[b, j]),
            None,
        ),
        (
            {"causal": True, "logits": Logits(slopes=jnp.asarray(SLOPES))},
            lambda b, h, i, j: j <= i,
            lambda x, b, h, i, j: x - slopes[h] * (i - j).abs(),
        ),
        (
            {"logits": Logits(logit_cap=2.0)},
            lambda b, h, i, j: i >= 0,
            lambda x, b, h, i, j: 2 * torch.tanh(x / 2),
        ),
    ],
)
def test_flex_attention_and_its_log_sum_exp(impl, options, seen, score):
    arguments = draw()
    mask = create_block_mask(seen, B, H, T, T, device="cpu")
    theirs, rest = flex_attention(
        *heads_first(arguments),
        score_mod=score,
        block_mask=mask,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )
    ours = attention_with_lse(
        *map(jnp.asarray, arguments.values()),
        **{k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in options.items()},
        impl=impl,
    )
    close(ours.output, theirs.transpose(1, 2))
    close(ours.lse, rest.lse.transpose(1, 2))


def test_eager_attention_with_sink_logits():
    arguments, sinks = draw(), np.random.default_rng(2).standard_normal(H).astype(np.float32)
    module = types.SimpleNamespace(num_key_value_groups=H // G, sinks=torch.tensor(sinks), training=False)
    hidden = torch.full((T, T), -torch.inf).triu(1)[None, None]
    theirs, _ = modeling_gpt_oss.eager_attention_forward(module, *heads_first(arguments), hidden, scaling=0.3)
    close(
        attention(
            **jax.tree.map(jnp.asarray, arguments),
            causal=True,
            scale=0.3,
            logits=Logits(sink_logits=jnp.asarray(sinks)),
        ),
        theirs,
    )


def test_eager_attention_with_soft_cap():
    arguments = draw()
    module = types.SimpleNamespace(num_key_value_groups=H // G, head_dim=D, training=False)
    hidden = torch.full((T, T), -torch.inf).triu(1)[None, None]
    theirs, _ = modeling_gemma2.eager_attention_forward(module, *heads_first(arguments), hidden, softcap=1.5)
    ours = attention(**jax.tree.map(jnp.asarray, arguments), causal=True, logits=Logits(logit_cap=1.5))
    close(ours, theirs)
