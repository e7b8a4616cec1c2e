"""Two layers of every mixer learn what asks for mixing along time, packed and under a scan over layers.

A row is two segments of six tokens, with padding around and inside. A model that sees every token by itself can only
guess: a language model has to know how the segment began, a classifier whether two tokens of a segment are equal, where
rows of both classes hold the same tokens.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from layers.mixers import MIXERS
from seqmodels import build_model
from tests.layers.mixers.table import MIXERS as TABLE

# The first line of every mixer.
LINES = {name: entry for entry, (name, _) in reversed(TABLE.items())}
# Mixers whose initial values depend on the layer.
PLACED = [name for name in sorted(LINES) if "layer" in {f.name for f in dataclasses.fields(MIXERS[name][0])}]
# Layers that it takes to see a segment of six tokens, for mixers that see fewer at once.
DEPTHS = {"rwkv_channel": 4}
STEPS, LEARNING_RATE = 80, 0.03
CLASSIFIER = {"kind": "classifier", "num_classes": 2}
IDS = np.tile(np.array([0, 3, 3, 0, 3, 3, 3, 3, 2, 2, 2, 2, 2, 2, 0, 0], np.int32), (8, 1))
VALUES, FILLERS, QUERY = (1, 2, 3, 4), (5, 6), 7


def in_rows(segments):
    """Puts (8, 2, 6) to where the segments stand in the rows."""
    rows = np.zeros(IDS.shape, segments.dtype)
    rows[IDS != 0] = segments.reshape(-1)
    return jnp.asarray(rows)


def recall():
    """Tokens and next tokens of "value, three fillers, query, value", and ones at the queries."""
    rng = np.random.default_rng(0)
    segments = rng.choice(FILLERS, (8, 2, 6)).astype(np.int32)
    segments[..., 4] = QUERY
    segments[..., 0] = segments[..., 5] = rng.permutation(np.repeat(VALUES, 4)).reshape(8, 2)
    queries = (segments == QUERY).astype(np.float32)
    return in_rows(segments), in_rows(np.roll(segments, -1, axis=2)), in_rows(queries)


def equality():
    """Tokens of segments with two values among fillers; class 0 if the two are equal, in both segments of the row."""
    rng = np.random.default_rng(0)
    a, b = VALUES[:2]
    pairs = [[(a, a), (b, b)], [(b, b), (a, a)], [(a, b), (b, a)], [(b, a), (a, b)]]
    pairs = np.repeat(pairs, 2, axis=0)
    segments = np.full((8, 2, 6), FILLERS[0], np.int32)
    segments[..., 0] = pairs[..., 0]
    np.put_along_axis(segments, rng.integers(1, 6, (8, 2, 1)), pairs[..., 1:], axis=2)
    return in_rows(segments), jnp.repeat(jnp.arange(2), 4), jnp.ones(8)


def model_of(entry, **options):
    name, mixer = TABLE[entry]
    # Where a layer stands it learns from the model.
    mixer = {key: value for key, value in mixer.items() if key not in ("layer", "depth")}
    depth = DEPTHS.get(name, 2)
    config = {"width": 8, "depth": depth, "pattern": (entry,), "mixers": {entry: {"mixer": name, **mixer}}}
    return build_model(config | {"vocab_size": 8, **options}, rngs=nnx.Rngs(0))


def loss(model, batch, key=None):
    inputs, targets, weights = batch
    logits, _ = model(inputs, segment_ids=jnp.asarray(IDS), key=key)
    errors = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(weights * errors) / weights.sum()


def train(model, batch):
    """The loss before every step. Parameters go through the optimizer as one vector, which compiles sooner."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    vector, unravel = ravel_pytree(params)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(LEARNING_RATE))

    def objective(vector, rest, key):
        model = nnx.merge(graph, unravel(vector), rest, copy=True)
        return loss(model, batch, key), nnx.state(model, nnx.Not(nnx.Param))

    def step(carry, key):
        vector, rest, moments = carry
        (value, rest), gradient = jax.value_and_grad(objective, has_aux=True)(vector, rest, key)
        update, moments = optimizer.update(gradient, moments)
        return (vector + update, rest, moments), value

    @jax.jit
    def run(vector, rest):
        keys = jax.random.split(jax.random.key(0), STEPS)
        return jax.lax.scan(step, (vector, rest, optimizer.init(vector)), keys)[1]

    return np.asarray(run(vector, rest))


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", PLACED)
def test_a_scan_may_run_all_layers_as_it_runs_the_first(name):
    """Layers differ in the values of their variables only."""
    model = nnx.eval_shape(lambda: model_of(LINES[name], **CLASSIFIER, scan=False))
    x = jax.ShapeDtypeStruct((*IDS.shape, 8), jnp.float32)

    def computation(mixer):
        graph, variables = nnx.split(mixer)
        traced = jax.make_jaxpr(lambda v, x: nnx.merge(graph, v)(x, segment_ids=jnp.asarray(IDS)))(
            variables, x
        )
        return str(traced), [np.asarray(constant) for constant in traced.consts]

    (first, constants), (second, others) = (
        computation(block.mixer) for block in list(model.stack.blocks)[:2]
    )
    assert first == second
    jax.tree.map(np.testing.assert_array_equal, constants, others)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LINES))
def test_two_layers_learn(name):
    if nnx.eval_shape(lambda: model_of(LINES[name], **CLASSIFIER)).stack.causal:
        kind, batch, guessing = {"kind": "language_model"}, recall(), math.log(len(VALUES))
    else:
        kind, batch, guessing = CLASSIFIER, equality(), math.log(2)
    model = model_of(LINES[name], **kind)
    assert model.stack.config.scan
    values = train(model, batch)
    assert np.isfinite(values).all()
    assert values[-5:].mean() < 0.5 * guessing, values[::6]


def test_every_registered_mixer_learns_here():
    assert set(LINES) == set(MIXERS)
