"""Replaced-token detection against transformers' ElectraForMaskedLM and ElectraForPreTraining with shared embeddings, float32, to 2e-5.

Logits of both, and both losses as means over hidden and over real tokens. The discriminator there reads the tokens that ours drew.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

from experiments.tasks.masked import MaskedTask
from seqmodels import build_model
from tests.parity.test_attention_mixers import copy, fill

VOCABULARY, MASK, WIDTH, NARROW, HEADS, TIME = 13, 12, 16, 8, 2, 11
OURS = {
    "kind": "replaced_token_detector",
    "vocab_size": VOCABULARY,
    "width": WIDTH,
    "depth": 2,
    "pattern": ("attention",),
    "mixers": {"attention": {"heads": HEADS, "causal": False, "position": "none", "bias": True}},
    "channel": "mlp",
    "channels": {"mlp": {"hidden": 24, "activation": "gelu_erf", "bias": True}},
    "norm": "layer_norm",
    "norm_options": {"epsilon": 1e-12},
    "norm_position": "post",
    "final_norm": False,
    "absolute_positions": "learned",
    "max_positions": TIME,
    "token_types": 2,
    "embedding_norm": True,
    "embedding_norm_epsilon": 1e-12,
    "embedding_norm_place": "sum",
    "generator": {"width": NARROW, "depth": 1},
    "scan": False,
}
THEIRS = dict(
    vocab_size=VOCABULARY,
    embedding_size=WIDTH,
    num_attention_heads=HEADS,
    intermediate_size=24,
    max_position_embeddings=TIME,
    pad_token_id=0,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def array(tensor):
    return jnp.asarray(tensor.detach().numpy())


def norm(ours, theirs):
    ours.scale[...], ours.bias[...] = array(theirs.weight), array(theirs.bias)


def layers(stack, encoder):
    for block, layer in zip(stack.blocks, encoder.layer, strict=True):
        for name in ("query", "key", "value"):
            copy(getattr(block.mixer, name), getattr(layer.attention.self, name))
        copy(block.mixer.output, layer.attention.output.dense)
        norm(block.mixer_norm, layer.attention.output.LayerNorm)
        copy(block.channel.up, layer.intermediate.dense)
        copy(block.channel.down, layer.output.dense)
        norm(block.channel_norm, layer.output.LayerNorm)


def models():
    generator = fill(ElectraForMaskedLM(ElectraConfig(hidden_size=NARROW, num_hidden_layers=1, **THEIRS)))
    judge = fill(ElectraForPreTraining(ElectraConfig(hidden_size=WIDTH, num_hidden_layers=2, **THEIRS)))
    generator.electra.embeddings.load_state_dict(judge.electra.embeddings.state_dict())
    ours = build_model(OURS, rngs=nnx.Rngs(0))
    theirs = judge.electra.embeddings
    ours.embedding.table[...] = array(theirs.word_embeddings.weight)
    ours.embedding.positions[...] = array(theirs.position_embeddings.weight)
    ours.embedding.types[...] = array(theirs.token_type_embeddings.weight)
    norm(ours.embedding.norm, theirs.LayerNorm)
    copy(ours.generator_input, generator.electra.embeddings_project)
    layers(ours.generator, generator.electra.encoder)
    copy(ours.generator_transform, generator.generator_predictions.dense)
    norm(ours.generator_transform_norm, generator.generator_predictions.LayerNorm)
    ours.generator_bias[...] = array(generator.generator_lm_head.bias)
    layers(ours.stack, judge.electra.encoder)
    copy(ours.transform, judge.discriminator_predictions.dense)
    copy(ours.score, judge.discriminator_predictions.dense_prediction)
    return ours, generator, judge


def test_logits_and_losses():
    ours, generator, judge = models()
    rng = np.random.default_rng(0)
    tokens, hidden = rng.integers(1, MASK, (3, TIME)), rng.random((3, TIME)) < 0.3
    real = np.arange(TIME) < np.array([[TIME], [7], [9]])
    hidden &= real
    inputs = np.where(hidden, MASK, tokens)
    labels = np.where(hidden, tokens, -1)
    batch = dict(
        inputs=inputs, labels=labels, segment_ids=real.astype(np.int32), weight=np.ones(3, np.float32)
    )
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    key = jax.random.key(1)
    outputs, _ = ours(batch["inputs"], labels=batch["labels"], segment_ids=batch["segment_ids"], key=key)
    drawn = jax.random.categorical(jax.random.fold_in(key, 2), outputs.logits)
    read = np.where(hidden, np.asarray(drawn), tokens)
    mask = torch.tensor(real.astype(np.int64))
    with torch.no_grad():
        masked = generator(
            torch.tensor(inputs), attention_mask=mask, labels=torch.tensor(np.where(hidden, tokens, -100))
        )
        judged = judge(
            torch.tensor(read), attention_mask=mask, labels=torch.tensor((read != tokens).astype(np.int64))
        )
    np.testing.assert_allclose(outputs.logits[real], masked.logits.numpy()[real], atol=2e-5)
    np.testing.assert_allclose(outputs.scores[real], judged.logits.numpy()[real], atol=2e-5)
    loss, sums = MaskedTask().loss(outputs, batch)
    np.testing.assert_allclose(loss, masked.loss.item() + 50.0 * judged.loss.item(), rtol=1e-5)
    np.testing.assert_allclose(sums["generator_loss"] / sums["count"], masked.loss.item(), rtol=1e-5)
