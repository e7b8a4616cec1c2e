"""A pointer network is its equation, reads no padding, follows a set in any order and points at what whole targets give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.training.model import SplitModel
from seqmodels import build_model
from tests.layers.mixers.literal import apply, filled, rms, sigmoid, softmax, wide

WIDTH = 6
MODEL = dict(
    kind="pointer_network",
    input_size=2,
    width=WIDTH,
    depth=1,
    pattern=("lstm",),
    channel="none",
    encoder=None,
)
SET = dict(process_steps=2, glimpse=True)
RNG = np.random.default_rng(0)
SOURCE = jnp.asarray(RNG.normal(size=(2, 5, 2)), jnp.float32)
SOURCE_IDS = jnp.asarray([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
TARGET = jnp.asarray([[0, 2, 5, 1], [0, 3, 1, 0]])
IDS = jnp.asarray([[1, 1, 1, 1], [1, 1, 1, 0]])


def made(**options):
    return filled(lambda: build_model(MODEL | options, rngs=nnx.Rngs(0)))


def pointed(module, items, query):
    return np.tanh(apply(module.items, items) + apply(module.queries, query)) @ wide(module.scores)


def equation(model, source, target):
    """The logits of one row without padding, step by step: end, and items."""

    def norm(layer, x):
        return rms(x, layer.config.epsilon) * wide(layer.scale)

    x = apply(model.embedding.map, source)
    items = x + apply(model.down, np.maximum(apply(model.up, x), 0))
    if model.processing is None:
        read = items.mean(0)
    else:
        read, cells = np.zeros(2 * WIDTH), np.zeros(WIDTH)
        for _ in range(model.processing.steps):
            i, f, g, o = np.split(apply(model.processing.gates, read), 4)
            cells = sigmoid(f) * cells + sigmoid(i) * np.tanh(g)
            asked = sigmoid(o) * np.tanh(cells)
            read = np.concatenate([asked, softmax(items @ asked) @ items])
    inputs = np.concatenate([apply(model.enter, read)[None], x])[target]
    items = np.concatenate([wide(model.end)[None], items])
    block = model.stack.layers[0]
    h, c, logits = np.zeros(WIDTH), np.zeros(WIDTH), []
    for step in inputs:
        given = apply(block.mixer.input, norm(block.mixer_norm, step))
        i, f, g, o = np.split(given + h @ wide(block.mixer.recurrent) + wide(block.mixer.bias), 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        d = norm(model.norm, step + h)
        if model.glimpse is not None:
            d = d + softmax(pointed(model.glimpse, items, d)) @ items
        logits.append(pointed(model.pointing, items, d))
    return np.array(logits)


@pytest.mark.sample(2)
@pytest.mark.parametrize("options", [{}, SET])
def test_logits_are_those_of_the_equation_and_padding_is_not_read(options):
    model = made(**options)
    run = nnx.jit(
        lambda model, source: model(source, TARGET, source_segment_ids=SOURCE_IDS, segment_ids=IDS)[0]
    )
    # What is not finite stands in the padding.
    got = np.asarray(run(model, jnp.where(SOURCE_IDS[..., None] == 1, SOURCE, jnp.nan)))
    for row in range(2):
        real, count = IDS[row] == 1, SOURCE_IDS[row].sum()
        want = equation(model, np.asarray(SOURCE[row, :count], np.float64), np.asarray(TARGET[row][real]))
        np.testing.assert_allclose(got[row, real, : count + 1], want, atol=2e-6)
        assert np.all(got[row, real, count + 1 :] == -np.inf)


@pytest.mark.slow
def test_a_set_in_another_order_has_the_same_logits_in_that_order():
    model, order = made(**SET), np.array([3, 0, 4, 1, 2])
    named = jnp.where(TARGET[:1] == 0, 0, 1 + np.argsort(order)[TARGET[:1] - 1])
    got, want = model(SOURCE[:1, order], named)[0], model(SOURCE[:1], TARGET[:1])[0]
    np.testing.assert_allclose(got, want[:, :, np.concatenate([[0], 1 + order])], atol=2e-6)
    read = made(encoder=dict(depth=1))
    assert not np.allclose(
        read(SOURCE[:1, order], named)[0][0, 0, 1:], read(SOURCE[:1], TARGET[:1])[0][0, 0, 1:][order]
    )


@pytest.mark.slow
@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize("mixer", ["lstm", "attention"])
def test_points_are_the_likeliest_items_of_whole_targets(mixer, distinct):
    model = made(**SET, pattern=(mixer,), mixer_defaults=dict(heads=2, head_dim=4))
    # An end of W_1 e_0 = -9 v is never likely, so that rows are long.
    end = -9 * wide(model.pointing.scores) @ np.linalg.inv(wide(model.pointing.items.kernel))
    model.end[...] = jnp.asarray(end, jnp.float32)
    found = np.asarray(model.points(SOURCE, 4, segment_ids=SOURCE_IDS, distinct=distinct))
    assert len({*found[0]} - {0}) > 1 or not distinct
    target, ended = jnp.zeros((2, 1), jnp.int32), np.zeros(2, bool)
    for step in range(4):
        logits = np.array(model(SOURCE, target, source_segment_ids=SOURCE_IDS)[0])[:, -1]
        if distinct:
            for row in range(2):
                logits[row, [item for item in target[row, 1:].tolist() if item]] = -np.inf
        best = np.where(ended, 0, logits.argmax(-1))
        np.testing.assert_array_equal(found[:, step], best)
        ended |= best == 0
        target = jnp.concatenate([target, jnp.asarray(best[:, None], jnp.int32)], axis=1)


@pytest.mark.slow
def test_training_reads_pairs_of_vectors_and_pointers():
    split = SplitModel(lambda rngs: build_model(MODEL | SET, rngs=rngs), padding="end", packed=False)
    parameters, statistics = split.initialise(jax.random.key(0))
    named = np.zeros((2, 5, 2), np.float32)
    named[:, :4, 0] = TARGET
    ids = np.stack([SOURCE_IDS, np.pad(IDS, ((0, 0), (0, 1)))], 1)
    batch = dict(inputs=jnp.asarray(np.stack([SOURCE, named], 1)), segment_ids=jnp.asarray(ids))
    got, _ = split(parameters, statistics, batch, key=None)
    model = split.module(parameters, statistics)
    want, _ = model(SOURCE, TARGET, source_segment_ids=SOURCE_IDS, segment_ids=IDS)
    np.testing.assert_allclose(got[:, :4][IDS == 1], want[IDS == 1], atol=1e-6)

    @jax.jit
    @jax.grad
    def gradients(parameters):
        y, _ = split(parameters, statistics, batch, key=jax.random.key(1))
        return jnp.where(jnp.isfinite(y) & (ids[:, 1, :, None] == 1), y * jnp.arange(6)[None, None], 0).sum()

    for name, gradient in gradients(parameters).items():
        assert np.isfinite(gradient).all(), name
        assert np.any(np.asarray(gradient) != 0), name
