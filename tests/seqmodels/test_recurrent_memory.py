"""A recurrent memory is its segments read one after the other by a plain stack, and its gradients pass as many borders as they should."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.segments import Segments
from seqmodels import build_model
from tests.layers.mixers.literal import apply, filled, rms, softmax, wide

VOCABULARY, WIDTH, MEMORY, SEGMENT = 5, 6, 2, 3
MODEL = dict(
    kind="recurrent_memory",
    vocab_size=VOCABULARY,
    width=WIDTH,
    depth=1,
    pattern=("attention",),
    mixer_defaults=dict(heads=1, position="none"),
    absolute_positions="learned",
    max_positions=SEGMENT,
    channel="none",
    memory=MEMORY,
    segment=SEGMENT,
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, (2, 9)))
# One text ends inside a segment, the other one before the last segment.
IDS = jnp.asarray([[1] * 8 + [0], [1] * 5 + [0] * 4])


def made(**options):
    return filled(lambda: build_model(MODEL | options, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def model():
    return made()


def equation(model, tokens, memory=None):
    """Logits and memory of one text, segment by segment."""
    block, embedding = model.stack.layers[0], model.embedding
    memory, logits = wide(model.memory) if memory is None else memory, []

    def norm(layer, x):
        return rms(x, layer.config.epsilon) * wide(layer.scale)

    for start in range(0, len(tokens), SEGMENT):
        own = tokens[start : start + SEGMENT]
        x = wide(embedding.table)[own] + wide(embedding.positions)[: len(own)]
        x = np.concatenate([memory, x, memory])
        y, mixer = norm(block.mixer_norm, x), block.mixer
        q, k, v = (apply(f, y) for f in (mixer.query, mixer.key, mixer.value))
        o = np.array([softmax(k[: i + 1] @ q[i] / np.sqrt(WIDTH)) @ v[: i + 1] for i in range(len(x))])
        h = norm(model.norm, x + apply(mixer.output, o))
        memory = h[-MEMORY:]
        logits.append(h[MEMORY:-MEMORY] @ wide(embedding.table).T)
    return np.concatenate(logits), memory


def test_segments_are_read_one_after_the_other(model):
    """Rows whose last segments are not full, and those of padding alone, in one call; and whole segments with a state."""
    run = nnx.jit(lambda model, ids: model(TOKENS, segment_ids=Segments.of(ids, packed=False))[0])
    got = np.asarray(run(model, IDS))
    for row, count in ((0, 8), (1, 5)):
        want, _ = equation(model, np.asarray(TOKENS[row, :count]))
        np.testing.assert_allclose(got[row, :count], want, atol=2e-6)


@pytest.mark.slow
def test_states_are_carried_between_segments_and_past_padding(model):
    whole, _ = model(TOKENS)
    np.testing.assert_allclose(whole[0], equation(model, np.asarray(TOKENS[0]))[0], atol=2e-6)
    first, state = model(TOKENS[:, :3], model.init_state(2))
    second, state = model(TOKENS[:, 3:], state)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, atol=2e-6)
    np.testing.assert_allclose(state.memory[1], equation(model, np.asarray(TOKENS[1]))[1], atol=2e-6)
    _, ended = model(TOKENS, model.init_state(2), segment_ids=Segments.of(IDS, packed=False))
    np.testing.assert_allclose(ended.memory[1], equation(model, np.asarray(TOKENS[1, :5]))[1], atol=2e-6)
    assert ended.count.tolist() == [3, 2]
    short, _ = model(TOKENS[:, :8])
    np.testing.assert_allclose(short, whole[:, :8], atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("unroll, reached", [(None, [0, 1, 2]), (1, [2]), (2, [2])])
def test_gradients_pass_as_many_borders_as_unrolled(unroll, reached):
    """Of the outputs of the last of three segments: with two unrolled its memory is cut, and that of the second is not."""
    model = made(unroll=unroll)

    @partial(jax.jit, static_argnums=1)
    def by_token(x, last):
        def loss(x):
            state = model.init_state(2)
            parts = []
            for segment in x:
                state, h = model._read(state, segment, None, None)
                parts.append(h)
            return jnp.square(parts[last] @ jnp.arange(WIDTH)).sum()

        return jnp.abs(jax.grad(loss)(x)).sum((1, 2, 3))

    x, _ = model.embedding(TOKENS.reshape(-1, SEGMENT))
    x = jnp.moveaxis(x.reshape(2, 3, SEGMENT, WIDTH), 1, 0)
    assert np.flatnonzero(by_token(x, 2)).tolist() == reached
    assert np.flatnonzero(by_token(x, 1)).tolist() == ([1] if unroll == 1 else [0, 1])


@pytest.mark.slow
def test_dropout_differs_between_segments_and_every_parameter_has_a_gradient():
    model = made(dropout=0.5)
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def loss(parameters, tokens):
        y, _ = nnx.merge(graph, parameters, rest)(tokens, key=jax.random.key(0))
        return jnp.square(y).sum(), y

    same = jnp.full((1, 9), 3)
    (_, y), gradients = jax.value_and_grad(loss, has_aux=True)(parameters, same)
    assert not np.allclose(y[:, :3], y[:, 3:6])
    for path, gradient in jax.tree.leaves_with_path(gradients):
        assert np.abs(gradient).max() > 0, path
