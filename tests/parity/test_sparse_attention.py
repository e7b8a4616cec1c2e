"""Sparse and low-rank attention against the modules of transformers, weights copied over, float32, to 2e-5.

longformer        LongformerSelfAttention, with two global tokens and without
bigbird           BigBirdBlockSparseAttention, whose random blocks are those of ours
longt5            LongT5LocalAttention; LongT5TransientGlobalAttention, lengths of whole blocks and with tokens behind them
nystromformer     NystromformerSelfAttention with the coefficient per matrix, which its option of that name does not reach
reformer          LSHSelfAttention of one round, whose rotations are those of ours. Theirs joins several rounds end to end, so
                  that the chunk before the first of a round is the last of another; ours is of the same round

BigBird's own random blocks are all block 0 in evaluation there. Informer draws keys anew in every call and is not compared.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import BigBirdConfig, LongformerConfig, LongT5Config, NystromformerConfig, ReformerConfig
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention
from transformers.models.longt5.modeling_longt5 import (
    LongT5LocalAttention,
    LongT5TransientGlobalAttention,
    _get_local_attention_mask,
)
from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from layers.mixers.attention.bigbird import block_plan
from tests.parity.test_attention_mixers import WIDTH, B, build, copy, fill

HEADS = 4
EYE = jnp.eye(WIDTH)


def inputs(time):
    return np.random.default_rng(0).standard_normal((B, time, WIDTH)).astype(np.float32)


def compare(mixer, x, theirs):
    np.testing.assert_allclose(mixer(jnp.asarray(x))[0], theirs.detach().numpy(), atol=2e-5, rtol=0)


def without_output(mixer):
    """The mixer with the identity for an output projection, which belongs to another module there."""
    mixer.output.kernel[...] = EYE
    return mixer


@pytest.mark.parametrize("count", [0, 2])
def test_longformer(count):
    config = LongformerConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, attention_window=[8], attention_probs_dropout_prob=0.0
    )
    theirs = fill(LongformerSelfAttention(config, 0))
    ours = without_output(build("longformer", heads=HEADS, window=4, global_tokens=count, bias=True))
    for name in ("query", "key", "value"):
        copy(getattr(ours, name), getattr(theirs, name))
        copy(getattr(ours, f"global_{name}"), getattr(theirs, f"{name}_global"))
    x = inputs(24)
    mask = torch.zeros(B, 24)
    mask[:, :count] = 10_000.0
    found = theirs(
        torch.tensor(x),
        attention_mask=mask,
        is_index_masked=mask < 0,
        is_index_global_attn=mask > 0,
        is_global_attn=count > 0,
    )
    compare(ours, x, found[0])


def test_bigbird(monkeypatch):
    config = BigBirdConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        block_size=3,
        num_random_blocks=2,
        max_position_embeddings=24,
    )
    theirs = fill(BigBirdBlockSparseAttention(config, seed=0))
    ours = without_output(build("bigbird", heads=HEADS, block=3, random_blocks=2, bias=True))
    for name in ("query", "key", "value"):
        copy(getattr(ours, name), getattr(theirs, name))
    plan = np.asarray(block_plan(ours.config, ours.seed[...], 8, jnp.asarray([8])))[0, :, 1:-1, 3:]
    assert plan.min() > 0
    monkeypatch.setattr(theirs, "_bigbird_block_rand_mask_with_head", lambda **_: list(plan))
    x = inputs(24)
    blocked, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(B, 24), 3)
    found = theirs(
        torch.tensor(x),
        band_mask=band,
        from_mask=rows,
        to_mask=columns,
        from_blocked_mask=blocked,
        to_blocked_mask=blocked,
    )
    compare(ours, x, found[0])


@pytest.mark.parametrize("kind, time", [("local", 21), ("transient_global", 20), ("transient_global", 23)])
def test_longt5(kind, time):
    config = LongT5Config(
        d_model=WIDTH,
        d_kv=WIDTH // HEADS,
        num_heads=HEADS,
        local_radius=5,
        global_block_size=4,
        dropout_rate=0.0,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
        is_decoder=False,
    )
    module = LongT5LocalAttention if kind == "local" else LongT5TransientGlobalAttention
    theirs = fill(module(config, has_relative_attention_bias=True))
    options = {"radius": 5, "block": 4, "buckets": 8, "max_distance": 12, "attention": kind}
    ours = build("longt5", heads=HEADS, **options)
    for name, of in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
        copy(getattr(ours, name), getattr(theirs, of))
    ours.near_bias[...] = jnp.asarray(theirs.relative_attention_bias.weight.detach().numpy())
    if kind != "local":
        ours.far_bias[...] = jnp.asarray(theirs.global_relative_attention_bias.weight.detach().numpy())
        ours.summary_scale[...] = jnp.asarray(theirs.global_input_layer_norm.weight.detach().numpy())
    x = inputs(time)
    mask = torch.ones(B, time)
    if kind == "local":
        mask = _get_local_attention_mask(mask, 6, mask.device)
    compare(ours, x, theirs(torch.tensor(x), mask=mask)[0])


def test_nystromformer():
    config = NystromformerConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_landmarks=5,
        segment_means_seq_len=20,
        conv_kernel_size=7,
        attention_probs_dropout_prob=0.0,
    )
    theirs = fill(NystromformerSelfAttention(config))
    theirs.init_option = "exact"
    ours = without_output(build("nystromformer", heads=HEADS, landmarks=5, taps=7, bias=True))
    for name in ("query", "key", "value"):
        copy(getattr(ours, name), getattr(theirs, name))
    ours.filter[...] = jnp.asarray(theirs.conv.weight.detach().numpy()[:, 0, :, 0].T)
    x = inputs(20)
    compare(ours, x, theirs(torch.tensor(x))[0])


def test_reformer(monkeypatch):
    config = ReformerConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        attention_head_size=WIDTH // HEADS,
        lsh_attn_chunk_length=4,
        num_buckets=6,
        num_hashes=1,
        lsh_attention_probs_dropout_prob=0.0,
        is_decoder=False,
        hash_seed=0,
    )
    theirs = fill(LSHSelfAttention(config, 0))
    ours = without_output(build("reformer", heads=HEADS, chunk=4, buckets=6))
    copy(ours.query, theirs.query_key)
    copy(ours.value, theirs.value)
    # Theirs are (heads, features, rounds, buckets / 2).
    rotations = torch.tensor(np.asarray(ours.rotations[...]).transpose(1, 2, 0, 3).copy())
    monkeypatch.setattr(torch, "randn", lambda shape, **_: rotations.reshape(tuple(shape)))
    x = inputs(24)
    compare(ours, x, theirs(torch.tensor(x)).hidden_states)
