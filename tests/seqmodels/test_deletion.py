"""MrT5 in an encoder-decoder: soft gates in training and tokens that leave in inference, against the equations in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.segments import Segments
from seqmodels import build_model
from tests.layers.mixers.literal import apply, heads, masked_softmax, rms, stirred, wide

HEADS, WIDTH, STRENGTH = 2, 8, 6.0
CONFIG = {
    "kind": "encoder_decoder",
    "vocab_size": 9,
    "width": WIDTH,
    "depth": 1,
    "pattern": ("attention+none",),
    "mixer_defaults": {"heads": HEADS, "position": {"name": "rope", "base": 50.0}},
    "encoder": {"depth": 2},
    "deletion": {"layer": 1, "target": 0.6, "proportional": 2.0, "integral": 0.1, "strength": STRENGTH},
}
SOURCE_IDS = np.array([[1] * 5 + [2] * 7, [1] * 8 + [0] * 4])
TARGET_IDS = np.array([[1] * 3 + [2] * 4 + [0], [1] * 8])
RNG = np.random.default_rng(0)
SOURCE, TARGET = RNG.integers(0, 9, SOURCE_IDS.shape), RNG.integers(0, 9, TARGET_IDS.shape)


@pytest.fixture(scope="module")
def model():
    made = stirred(build_model(CONFIG, rngs=nnx.Rngs(0)))
    gate = made.encoder.deletion.gate.gate
    gate.kernel.set_value(jax.random.normal(jax.random.key(10), gate.kernel.shape))
    gate.bias.set_value(-jnp.ones(1))
    return made


def normal(x, norm):
    return rms(x, norm.config.epsilon) * wide(norm.scale)


def attended(mixer, x, y, seen, positions=None, bias=0.0):
    """Attention of x to y; keys have a bias, and positions turn queries and keys if they are given."""
    q, k, v = (
        heads(apply(mixer.query, x), HEADS),
        *(heads(apply(f, y), HEADS) for f in (mixer.key, mixer.value)),
    )
    if positions is not None:
        half = q.shape[-1] // 2
        turn = np.exp(1j * positions[:, None, None] * 50.0 ** (-np.arange(half) / half))
        q, k = ((z[..., :half] + 1j * z[..., half:]) * turn for z in (q, k))
    logits = np.einsum("thk,shk->hts", q, k.conj()).real / np.sqrt(v.shape[-1])
    weights = masked_softmax(logits + bias, seen)
    return apply(mixer.output, np.einsum("hts,shk->thk", weights, v).reshape(x.shape))


def gates_of(model, x):
    gate = model.encoder.deletion.gate
    return -STRENGTH / (1 + np.exp(apply(gate.gate, normal(x, gate.norm))[:, 0]))


def literal(model, row, *, soft):
    """The logits of one row, and the gates of its source."""
    table, source = wide(model.decoder.embedding.table), SOURCE_IDS[row]
    places = np.asarray(Segments.of(jnp.asarray(SOURCE_IDS)).positions)[row]
    first, second = (model.encoder.block(layer) for layer in range(2))
    x = table[SOURCE[row]]
    x = x + attended(
        first.mixer, normal(x, first.mixer_norm), normal(x, first.mixer_norm), same(source, source), places
    )
    gates = gates_of(model, x)
    kept = np.ones(len(x), bool) if soft else gates > -STRENGTH / 2
    x, source, places, bias = x[kept], source[kept], places[kept], gates if soft else 0.0
    u = normal(x, second.mixer_norm)
    x = normal(x + attended(second.mixer, u, u, same(source, source), places, bias), model.encoder_norm)
    block, target = model.decoder.stack.block(0), TARGET_IDS[row]
    y = table[TARGET[row]]
    u, causal = normal(y, block.mixer_norm), np.tril(np.ones((len(y), len(y)), bool))
    spots = np.asarray(Segments.of(jnp.asarray(TARGET_IDS)).positions)[row]
    y = y + attended(block.mixer, u, u, same(target, target) & causal, spots)
    y = y + attended(block.cross, normal(y, block.cross_norm), x, same(target, source), bias=bias)
    return normal(y, model.decoder.norm) @ table.T, gates


def same(one, other):
    return (one[:, None] == other[None]) & (one != 0)[:, None] & (other != 0)[None]


@nnx.jit
def run(model, key):
    given = dict(source_segment_ids=jnp.asarray(SOURCE_IDS), segment_ids=jnp.asarray(TARGET_IDS))
    return model(jnp.asarray(SOURCE), jnp.asarray(TARGET), **given, key=key)[0]


@pytest.mark.parametrize("soft", [True, False])
def test_logits_are_those_of_the_equations(model, soft):
    got = run(model, jax.random.key(0) if soft else None)
    for row in range(2):
        want, gates = literal(model, row, soft=soft)
        real = SOURCE_IDS[row] != 0
        assert 0 < (gates[real] > -STRENGTH / 2).sum() < real.sum()
        there = TARGET_IDS[row] != 0
        np.testing.assert_allclose(got[row][there], want[there], atol=2e-5)


def test_the_loss_and_the_controller(model):
    deletion = model.encoder.deletion
    deletion.terms[...] = jnp.zeros(2)
    gates = [literal(model, row, soft=True)[1][SOURCE_IDS[row] != 0] for row in range(2)]
    gates = np.concatenate(gates)
    rate, p, i = (gates < -STRENGTH / 2).mean(), 0.0, 0.0
    for _ in range(3):
        run(model, jax.random.key(0))
        np.testing.assert_allclose(
            deletion.auxiliary[...], max(0, p + i) * gates.mean(), rtol=1e-4, atol=1e-7
        )
        p, i = 0.9 * p + 0.1 * 2.0 * (0.6 - rate), i + 0.1 * (0.6 - rate)
        np.testing.assert_allclose(deletion.terms[...], [p, i], rtol=1e-5)
    before = np.asarray(deletion.terms[...])
    run(model, None)
    np.testing.assert_array_equal(deletion.terms[...], before)


def test_there_is_room_for_some_tokens_and_gradients_reach_the_gate():
    config = CONFIG | {"deletion": {"layer": 0, "weight": 0.5, "room": 0.25}}
    model = build_model(config, rngs=nnx.Rngs(0))
    encoded = jax.eval_shape(lambda: model.encode(jnp.asarray(SOURCE)))
    assert encoded.x.shape == (2, 3, WIDTH)
    source, target, key = jnp.asarray(SOURCE), jnp.asarray(TARGET), jax.random.key(0)
    grads = nnx.jit(nnx.grad(lambda model: jnp.sum(model(source, target, key=key)[0] ** 2)))(model)
    assert float(jnp.abs(grads.encoder.deletion.gate.gate.kernel[...]).max()) > 1e-4


@pytest.mark.parametrize("position", ["t5", "alibi", "none"])
def test_gates_are_added_beside_biases_of_positions(position):
    config = CONFIG | {"mixer_defaults": {"heads": HEADS, "position": position}, "deletion": None}
    mixer = build_model(config, rngs=nnx.Rngs(0)).encoder.block(0).mixer
    x = jnp.asarray(RNG.standard_normal((1, 6, WIDTH)), jnp.float32)
    kept, ids = [0, 2, 3, 5], jnp.ones((1, 6), jnp.int32)
    gates = jnp.where(jnp.isin(jnp.arange(6), jnp.asarray(kept)), 0.0, -1e4)[None]
    gated = dataclasses.replace(Segments.of(ids), gates=gates)
    left = dataclasses.replace(Segments.of(ids[:, :4]), positions=jnp.asarray([kept]))
    apart = jax.jit(lambda x, segments: mixer(x, segment_ids=segments)[0])
    soft, hard = apart(x, gated), apart(x[:, jnp.asarray(kept)], left)
    np.testing.assert_allclose(soft[:, jnp.asarray(kept)], hard, atol=1e-6)
