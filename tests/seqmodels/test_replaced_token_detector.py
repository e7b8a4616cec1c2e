"""Replaced-token detection: both models and both losses written out in NumPy, samples, gradients and packing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf, log_softmax

from experiments.tasks.masked import MaskedTask
from layers.parameters import NO_DECAY, group_of
from seqmodels import build_model
from tests.layers.mixers.literal import apply, heads, masked_softmax, rms, stirred, wide

VOCABULARY, MASK, HEADS, WIDTH, NARROW = 7, 6, 2, 8, 4
CONFIG = {
    "kind": "replaced_token_detector",
    "vocab_size": VOCABULARY,
    "width": WIDTH,
    "depth": 1,
    "pattern": ("attention+none",),
    "mixer_defaults": {"heads": HEADS, "causal": False, "position": "none"},
    "generator": {"width": NARROW},
    "detection_weight": 3.0,
}
RNG = np.random.default_rng(1)
TOKENS = RNG.integers(0, MASK, (2, 9)).astype(np.int32)
HIDDEN = np.array([[0, 1, 0, 1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 1, 0, 0, 0, 0]], bool)
IDS = np.array([[1] * 9, [1] * 3 + [2] * 4 + [0] * 2], np.int32)
KEY = jax.random.key(6)
BATCH = {
    "inputs": np.where(HIDDEN, MASK, TOKENS),
    "labels": np.where(HIDDEN, TOKENS, -1),
    "segment_ids": IDS,
    "weight": np.ones(2, np.float32),
}


@pytest.fixture(scope="module")
def model():
    return stirred(build_model(CONFIG, rngs=nnx.Rngs(0)))


def run(model, key=None, **changes):
    batch = {name: jnp.asarray(array) for name, array in (BATCH | changes).items()}
    return model(batch["inputs"], labels=batch["labels"], segment_ids=batch["segment_ids"], key=key)[0]


def body(stack, norm, x, ids):
    """norm(x + attention(norm(x))) of one row, whose tokens see those of their segment."""
    block, mixer = stack.blocks[0], stack.blocks[0].mixer
    u = rms(x, block.mixer_norm.config.epsilon) * wide(block.mixer_norm.scale)
    q, k, v = (heads(apply(f, u), HEADS) for f in (mixer.query, mixer.key, mixer.value))
    logits = np.einsum("thk,shk->hts", q, k) / np.sqrt(q.shape[2])
    weights = masked_softmax(logits, (ids[:, None] == ids) & (ids[:, None] != 0))
    y = x + apply(mixer.output, np.einsum("hts,shk->thk", weights, v).reshape(x.shape))
    return rms(y, norm.config.epsilon) * wide(norm.scale)


def gelu(x):
    return x * (1 + erf(x / np.sqrt(2))) / 2


def layer_norm(x, norm, epsilon):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
    return x * wide(norm.scale) + wide(norm.bias)


def literal_logits(model, inputs, ids):
    table = wide(model.embedding.table)
    g = body(model.generator, model.generator_norm, apply(model.generator_input, table[inputs]), ids)
    y = layer_norm(gelu(apply(model.generator_transform, g)), model.generator_transform_norm, 1e-12)
    return y @ table.T + wide(model.generator_bias)


def literal_scores(model, read, ids):
    h = body(model.stack, model.norm, wide(model.embedding.table)[read], ids)
    return apply(model.score, gelu(apply(model.transform, h)))[:, 0]


def test_both_models_and_losses_are_the_equation(model):
    outputs = run(model, KEY)
    logits = np.asarray(outputs.logits, np.float64)
    noise = jax.random.fold_in(KEY, 2)
    sample = np.argmax(np.asarray(outputs.logits) + np.asarray(jax.random.gumbel(noise, logits.shape)), -1)
    read = np.where(HIDDEN, sample, TOKENS)
    replaced, real = read != TOKENS, IDS != 0
    np.testing.assert_array_equal(outputs.replaced, replaced)
    assert 0 < replaced.sum() < HIDDEN.sum()  # some samples are the hidden token itself
    for row in range(2):
        expected = literal_logits(model, BATCH["inputs"][row], IDS[row])
        np.testing.assert_allclose(logits[row][real[row]], expected[real[row]], atol=2e-5)
        expected = literal_scores(model, read[row], IDS[row])
        np.testing.assert_allclose(outputs.scores[row][real[row]], expected[real[row]], atol=2e-5)
    masked = -log_softmax(logits, -1)[HIDDEN, TOKENS[HIDDEN]].mean()
    p = 1 / (1 + np.exp(-np.asarray(outputs.scores, np.float64)))
    detected = -np.where(replaced, np.log(p), np.log(1 - p))[real].mean()
    loss, sums = MaskedTask().loss(outputs, {name: jnp.asarray(array) for name, array in BATCH.items()})
    np.testing.assert_allclose(loss, masked + 3.0 * detected, rtol=1e-5)
    np.testing.assert_allclose(sums["generator_loss"] / sums["count"], masked, rtol=1e-5)
    np.testing.assert_allclose(sums["detection_loss"] / sums["detection_loss_count"], detected, rtol=1e-5)
    told = ((p > 0.5) == replaced) & real
    assert sums["detection_accuracy"] == told.sum()
    assert (sums["found"], sums["found_count"]) == ((told & replaced).sum(), replaced.sum())
    assert (sums["replaced"], sums["replaced_count"]) == (replaced.sum(), real.sum())


@pytest.mark.slow
def test_a_sample_passes_no_gradient_and_the_embedding_is_shared(model):
    def loss(model):
        return jnp.sum(run(model, KEY).scores)

    gradients = nnx.grad(loss)(model)
    sizes = {
        "/".join(map(str, path)): float(jnp.abs(v[...]).max()) for path, v in nnx.to_flat_state(gradients)
    }
    assert all(size == 0 for name, size in sizes.items() if name.startswith("generator"))
    assert sizes["embedding/table"] > 0
    assert not hasattr(model, "generator_embedding")
    assert group_of(model.generator_bias) == NO_DECAY["group"]


def test_rows_do_not_depend_on_padding_or_on_other_segments(model):
    changed = np.where(IDS == 0, 3, BATCH["inputs"])
    changed[1, 4:6] = 1  # of the second segment
    before, after = run(model), run(model, inputs=changed)
    for one, other in ((before.logits, after.logits), (before.scores, after.scores)):
        np.testing.assert_array_equal(one[1, :3], other[1, :3])
        assert np.any(one[1, 3:7] != other[1, 3:7])


def test_without_labels_the_discriminator_reads_the_inputs(model):
    outputs = model(jnp.asarray(TOKENS), segment_ids=jnp.asarray(IDS))[0]
    assert not outputs.replaced.any()
    expected = literal_scores(model, TOKENS[0], IDS[0])
    np.testing.assert_allclose(outputs.scores[0], expected, atol=2e-5)


def test_the_generator_has_a_quarter_of_the_width():
    values = CONFIG | {"generator": {}, "width": 16, "mixer_defaults": {"heads": 2, "causal": False}}
    model = nnx.eval_shape(lambda: build_model(values, rngs=nnx.Rngs(0)))
    assert model.generator.config.width == 4
    assert model.config.generator.mixer_defaults == {"heads": 2, "causal": False}
