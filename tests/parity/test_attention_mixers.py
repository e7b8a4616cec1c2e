"""Attention mixers against the modules of transformers, weights copied over, float32.

rotary frequencies        modeling_rope_utils: linear, dynamic NTK at a fixed length, YaRN, partial rotary (1e-6)
ALiBi slopes              Bloom (1e-6); MPT for powers of two
T5's buckets              T5Attention, both directions, distances up to 200 (equal)
attention, RoPE           LlamaAttention with grouped heads and YaRN (2e-5)
attention, t5             T5Attention, causal and not (2e-5)
attention, sink_logits    GptOssAttention with its window (2e-5)
gated_attention           Qwen3NextAttention: q/k norm, part of the head turned, elementwise gate (2e-5)
mla                       DeepseekV3Attention, with and without query compression, and YaRN's scale (2e-5)
sparse_mla                DeepseekV32Attention, whose indexer chooses some of the tokens (2e-5)
"""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import (
    DeepseekV3Config,
    DeepseekV32Config,
    GptOssConfig,
    LlamaConfig,
    Qwen3NextConfig,
    T5Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.deepseek_v32 import modeling_deepseek_v32
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor
from transformers.models.qwen3_next import modeling_qwen3_next
from transformers.models.t5.modeling_t5 import T5Attention

from layers.mixers import make_mixer
from layers.positions import Rotary
from layers.positions.relative import alibi_slopes, relative_buckets
from layers.positions.rotary import rotary_frequencies

B, T, WIDTH = 2, 19, 32
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
OUR_YARN = {"name": "rope", "scaling": "yarn", "factor": 4.0, "length": 64}
HIDDEN = torch.full((T, T), -torch.inf).triu(1)[None, None]


def inputs():
    return np.random.default_rng(0).standard_normal((B, T, WIDTH)).astype(np.float32)


def build(name, **options):
    return make_mixer(name, options, given={"width": WIDTH}, rngs=nnx.Rngs(0))


def fill(module):
    """Random weights, norms included, of moderate size."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            spread = weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.3
            weight.copy_(spread * torch.randn(weight.shape, generator=generator))
    return module.eval()


def copy(linear, theirs, order=None):
    """A torch linear into ours; `order` picks its outputs."""
    weight = theirs.weight.detach().numpy()
    linear.kernel[...] = jnp.asarray((weight if order is None else weight[order]).T)
    if theirs.bias is not None:
        bias = theirs.bias.detach().numpy()
        linear.bias[...] = jnp.asarray(bias if order is None else bias[order])


def compare(mixer, theirs, tolerance=2e-5):
    """Ours in one call, and ours in three with a state, against theirs."""
    x, theirs = jnp.asarray(inputs()), theirs.detach().numpy()
    np.testing.assert_allclose(mixer(x)[0], theirs, atol=tolerance, rtol=0)
    if not mixer.causal:
        return
    state, pieces = mixer.init_state(B, max_length=T), []
    for start, stop in ((0, 11), (11, 12), (12, T)):
        y, state = mixer(x[:, start:stop], state)
        pieces.append(y)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), theirs, atol=tolerance, rtol=0)


def angles(rotary_embedding):
    return rotary_embedding(torch.tensor(inputs()), torch.arange(T)[None].expand(B, T))


@pytest.mark.parametrize(
    "parameters, ours, length",
    [
        ({"rope_type": "linear", "factor": 4.0}, {"scaling": "linear", "factor": 4.0}, None),
        # Dynamic NTK at a length L scales the base as static NTK with factor a L / L0 - (a - 1).
        ({"rope_type": "dynamic", "factor": 2.0}, {"scaling": "ntk", "factor": 2.0 * 3 - 1}, 3 * 512),
        (YARN, {"scaling": "yarn", "factor": 4.0, "length": 64}, None),
        (YARN | {"rope_theta": 5e5, "factor": 32.0}, {"base": 5e5, "scaling": "yarn", "factor": 32.0, "length": 64}, None),
        (YARN | {"partial_rotary_factor": 0.5}, {"scaling": "yarn", "factor": 4.0, "length": 64, "fraction": 0.5}, None),
    ],
)  # fmt: skip
def test_rotary_frequencies(parameters, ours, length):
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, max_position_embeddings=512)
    config.rope_parameters = {"rope_theta": 10_000.0} | parameters
    theirs, gain = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len=length)
    rope = Rotary(**ours)
    np.testing.assert_allclose(rotary_frequencies(rope.size(64), rope), theirs.numpy(), rtol=2e-6)
    assert rope.gain == pytest.approx(gain)


@pytest.mark.parametrize("heads", [1, 4, 8, 12, 20])
def test_alibi_slopes(heads):
    bloom = build_alibi_tensor(torch.ones(1, 3), heads, torch.float32)
    np.testing.assert_allclose(alibi_slopes(heads), bloom[:, 0, 1], rtol=1e-6)
    if heads & (heads - 1) == 0:
        mpt = -build_mpt_alibi_tensor(heads, 2)[:, 0, 0]
        np.testing.assert_allclose(alibi_slopes(heads), mpt, rtol=1e-6)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets(bidirectional):
    relative = np.arange(-200, 201)
    theirs = T5Attention._relative_position_bucket(torch.tensor(relative), bidirectional)
    ours = relative_buckets(jnp.asarray(relative), bidirectional=bidirectional, buckets=32, max_distance=128)
    np.testing.assert_array_equal(ours, theirs.numpy())


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 500.0}, YARN])
def test_llama(rope):
    config = LlamaConfig(
        hidden_size=WIDTH, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256
    )
    config.rope_parameters, config._attn_implementation = dict(rope), "eager"
    module = fill(modeling_llama.LlamaAttention(config, 0))
    position = {"name": "rope", "base": 500.0} if rope is not YARN else OUR_YARN
    mixer = build("attention", heads=4, kv_heads=2, position=position)
    for ours, name in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
        copy(getattr(mixer, ours), getattr(module, f"{name}_proj"))
    places = angles(modeling_llama.LlamaRotaryEmbedding(config))
    compare(mixer, module(torch.tensor(inputs()), places, HIDDEN)[0])


@pytest.mark.parametrize("causal", [True, False])
def test_t5(causal):
    config = T5Config(d_model=WIDTH, d_kv=6, num_heads=4, is_decoder=causal)
    config._attn_implementation = "eager"
    module = fill(T5Attention(config, has_relative_attention_bias=True, layer_idx=0))
    position = {"name": "t5"}
    mixer = build("attention", heads=4, head_dim=6, causal=causal, scale=1.0, position=position)
    for ours in ("query", "key", "value", "output"):
        copy(getattr(mixer, ours), getattr(module, ours[0]))
    mixer.position.table[...] = jnp.asarray(module.relative_attention_bias.weight.detach().numpy())
    compare(mixer, module(torch.tensor(inputs()), mask=HIDDEN if causal else None)[0])


def test_gpt_oss():
    config = GptOssConfig(
        hidden_size=WIDTH, num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=5,
        layer_types=["sliding_attention"], num_hidden_layers=1,
    )  # fmt: skip
    config._attn_implementation = "eager"
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10_000.0}
    module = fill(modeling_gpt_oss.GptOssAttention(config, 0))
    mixer = build("attention", heads=4, kv_heads=2, head_dim=8, window=5, sink_logits=True, bias=True)
    for ours, name in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
        copy(getattr(mixer, ours), getattr(module, f"{name}_proj"))
    mixer.sinks[...] = jnp.asarray(module.sinks.detach().numpy())
    hidden = HIDDEN + torch.full((T, T), -torch.inf).tril(-5)[None, None]
    places = angles(modeling_gpt_oss.GptOssRotaryEmbedding(config))
    compare(mixer, module(torch.tensor(inputs()), places, hidden)[0])


def test_qwen3_next():
    config = Qwen3NextConfig(
        hidden_size=WIDTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        partial_rotary_factor=0.25,
    )
    config._attn_implementation = "eager"
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    module = fill(modeling_qwen3_next.Qwen3NextAttention(config, 0))
    position = {"name": "rope", "fraction": 0.25}
    mixer = build("gated_attention", heads=4, kv_heads=2, head_dim=16, position=position)
    # Their query projection gives, head by head, queries and then gates.
    rows = np.arange(4 * 32).reshape(4, 2, 16)
    copy(mixer.query, module.q_proj, rows[:, 0].ravel())
    copy(mixer.gate, module.q_proj, rows[:, 1].ravel())
    for ours, name in (("key", "k"), ("value", "v"), ("output", "o")):
        copy(getattr(mixer, ours), getattr(module, f"{name}_proj"))
    for ours, theirs in ((mixer.query_norm, module.q_norm), (mixer.key_norm, module.k_norm)):
        ours.scale[...] = 1 + jnp.asarray(theirs.weight.detach().numpy())
    places = angles(modeling_qwen3_next.Qwen3NextRotaryEmbedding(config))
    compare(mixer, module(torch.tensor(inputs()), places, HIDDEN)[0])


def copy_latent(mixer, module, pairs):
    """Latent attention of 4 heads of 6 + 8 features; `pairs` is the order of the rotated ones."""
    head = np.concatenate([np.arange(6), 6 + pairs])
    queries = (14 * np.arange(4)[:, None] + head).ravel()
    if mixer.query_down is None:
        copy(mixer.query, module.q_proj, queries)
    else:
        copy(mixer.query_down, module.q_a_proj)
        copy(mixer.query, module.q_b_proj, queries)
        mixer.query_norm.scale[...] = jnp.asarray(module.q_a_layernorm.weight.detach().numpy())
    copy(mixer.latent, module.kv_a_proj_with_mqa, np.concatenate([np.arange(10), 10 + pairs]))
    mixer.latent_norm.scale[...] = jnp.asarray(module.kv_a_layernorm.weight.detach().numpy())
    copy(mixer.expand, module.kv_b_proj)
    copy(mixer.output, module.o_proj)


@pytest.mark.parametrize("query_latent", [None, 12])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("yarn", [False, True])
def test_deepseek(query_latent, interleaved, yarn):
    config = DeepseekV3Config(
        hidden_size=WIDTH, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=query_latent, kv_lora_rank=10,
        qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=5, rope_interleave=interleaved,
        max_position_embeddings=256,
    )  # fmt: skip
    config._attn_implementation = "eager"
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10_000.0}
    if yarn:
        config.rope_parameters = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}
    module = fill(modeling_deepseek_v3.DeepseekV3Attention(config, 0))
    mixer = build(
        "mla", heads=4, latent=10, query_latent=query_latent, head_dim=6, rope_dim=8, value_dim=5,
        position=OUR_YARN if yarn else "rope",
    )  # fmt: skip
    # Interleaved pairs (2i, 2i+1) become ours (i, i + 4), on queries and keys alike.
    copy_latent(mixer, module, np.arange(8).reshape(4, 2).T.ravel() if interleaved else np.arange(8))
    places = angles(modeling_deepseek_v3.DeepseekV3RotaryEmbedding(config))
    compare(mixer, module(torch.tensor(inputs()), places, HIDDEN)[0])


def test_deepseek_sparse():
    """With many heads: where few are, no product may be above zero, and which of equal scores are best is the library's choice."""
    config = DeepseekV32Config(
        hidden_size=WIDTH, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=12, kv_lora_rank=10,
        qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=5, max_position_embeddings=256,
        index_topk=5, index_n_heads=16, index_head_dim=14,
    )  # fmt: skip
    config._attn_implementation = "eager"
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10_000.0}
    module = fill(modeling_deepseek_v32.DeepseekV32Attention(config, 0))
    mixer = build(
        "sparse_mla", heads=4, latent=10, query_latent=12, head_dim=6, rope_dim=8, value_dim=5,
        top_k=5, index_heads=16, index_dim=14,
    )  # fmt: skip
    copy_latent(mixer, module, np.arange(8).reshape(4, 2).T.ravel())
    ours, theirs = mixer.indexer, module.indexer
    for linear, name in ((ours.query, "wq_b"), (ours.key, "wk"), (ours.weight, "weights_proj")):
        copy(linear, getattr(theirs, name))
    for name in ("weight", "bias"):
        value = jnp.asarray(getattr(theirs.k_norm, name).detach().numpy())
        getattr(ours.norm, "scale" if name == "weight" else name)[...] = value
    places = angles(modeling_deepseek_v32.DeepseekV32RotaryEmbedding(config))
    compare(mixer, module(torch.tensor(inputs()), places, HIDDEN)[0])
