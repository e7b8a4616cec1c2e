"""HMT is its segments read one after the other by a plain stack, with the memories that they recall, in NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.segments import Segments
from seqmodels import build_model
from tests.layers.mixers.literal import apply, filled, rms, softmax, wide

VOCABULARY, WIDTH, SEGMENT, RECALL, SENSORY, HALF = 5, 6, 4, 2, 1, 3
MODEL = dict(
    kind="hierarchical_memory",
    vocab_size=VOCABULARY,
    width=WIDTH,
    depth=1,
    pattern=("attention",),
    mixer_defaults=dict(heads=1, position="none"),
    absolute_positions="learned",
    max_positions=SEGMENT,
    channel="none",
    segment=SEGMENT,
    recall=RECALL,
    sensory=SENSORY,
    summary=HALF / SEGMENT,
    recall_width=5,
)
TIME = 15  # four segments, so that the first memory is forgotten in the last one
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, (2, TIME)))
IDS = jnp.asarray([[1] * TIME, [1] * 6 + [0] * 9])


def made(**options):
    return filled(lambda: build_model(MODEL | options, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def model():
    return made()


def between(model, ends, x):
    """The features of x between two copies of a vector, and those of the second copy."""
    block = model.stack.layers[0]

    def norm(layer, x):
        return rms(x, layer.config.epsilon) * wide(layer.scale)

    x = np.concatenate([ends, x, ends])
    y, mixer = norm(block.mixer_norm, x), block.mixer
    q, k, v = (apply(f, y) for f in (mixer.query, mixer.key, mixer.value))
    o = np.array([softmax(k[: i + 1] @ q[i] / np.sqrt(WIDTH)) @ v[: i + 1] for i in range(len(x))])
    h = norm(model.norm, x + apply(mixer.output, o))
    return h[1:-1], h[-1:]


def equation(model, tokens, sensory=SENSORY):
    """Logits and memories of one text."""
    embedding, memories, logits = model.embedding, [], []
    before = np.zeros((0, WIDTH))
    for start in range(0, len(tokens), SEGMENT):
        own = tokens[start : start + SEGMENT]
        x = wide(embedding.table)[own] + wide(embedding.positions)[: len(own)]
        _, q = between(model, wide(model.summary), x[:HALF])
        recalled = wide(model.memory)
        if memories:
            kept = np.concatenate(memories[-RECALL:])
            recalled = softmax(apply(model.key, kept) @ apply(model.query, q)[0] / np.sqrt(5)) @ kept
            recalled = recalled[None]
        h, memory = between(model, recalled, np.concatenate([before, x]))
        memories.append(memory)
        logits.append(h[len(before) :] @ wide(embedding.table).T)
        before = x[len(x) - sensory :]
    return np.concatenate(logits), np.concatenate(memories)


def test_segments_recall_memories_of_those_before(model):
    run = nnx.jit(lambda model, ids: model(TOKENS, segment_ids=Segments.of(ids, packed=False))[0])
    got = np.asarray(run(model, IDS))
    for row, count in ((0, TIME), (1, 6)):
        want, _ = equation(model, np.asarray(TOKENS[row, :count]))
        np.testing.assert_allclose(got[row, :count], want, atol=3e-6)


@pytest.mark.slow
def test_states_are_carried_between_segments_and_past_padding(model):
    run = nnx.jit(lambda model, tokens, state: model(tokens, state))
    first, state = run(model, TOKENS[:, :8], model.init_state(2))
    second, state = run(model, TOKENS[:, 8:12], state)
    want, memories = equation(model, np.asarray(TOKENS[0, :12]))
    np.testing.assert_allclose(jnp.concatenate([first, second], 1)[0], want, atol=3e-6)
    np.testing.assert_allclose(state.memories[0], memories[-RECALL:], atol=3e-6)
    ids = Segments.of(jnp.pad(IDS, ((0, 0), (0, 1))), packed=False)
    _, ended = model(jnp.pad(TOKENS, ((0, 0), (0, 1))), model.init_state(2), segment_ids=ids)
    assert ended.count.tolist() == [4, 2]
    np.testing.assert_allclose(ended.memories[1], equation(model, np.asarray(TOKENS[1, :6]))[1], atol=3e-6)


@pytest.mark.slow
def test_without_tokens_of_the_segment_before():
    model = made(sensory=0)
    got, _ = nnx.jit(lambda model: model(TOKENS))(model)
    np.testing.assert_allclose(got[0], equation(model, np.asarray(TOKENS[0]), sensory=0)[0], atol=3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("unroll, reached", [(None, [0, 1, 2]), (1, [2]), (2, [2])])
def test_gradients_pass_as_many_borders_as_unrolled(unroll, reached):
    model = made(unroll=unroll, sensory=0, recall=3)

    @partial(jax.jit, static_argnums=1)
    def by_segment(x, last):
        def loss(x):
            state, parts = model.init_state(2), []
            for segment in x:
                state, h = model._read(state, segment, None, None)
                parts.append(h)
            return jnp.square(parts[last] @ jnp.arange(WIDTH)).sum()

        return jnp.abs(jax.grad(loss)(x)).sum((1, 2, 3))

    x, _ = model.embedding(TOKENS[:, :12].reshape(-1, SEGMENT))
    x = jnp.moveaxis(x.reshape(2, 3, SEGMENT, WIDTH), 1, 0)
    assert np.flatnonzero(by_segment(x, 2)).tolist() == reached
    assert np.flatnonzero(by_segment(x, 1)).tolist() == ([1] if unroll == 1 else [0, 1])


@pytest.mark.slow
def test_every_parameter_has_a_gradient(model):
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def loss(parameters):
        y, _ = nnx.merge(graph, parameters, rest)(TOKENS, key=jax.random.key(0))
        return jnp.square(y).sum()

    for path, gradient in jax.tree.leaves_with_path(jax.grad(loss)(parameters)):
        assert np.abs(gradient).max() > 0, path
