"""Attention-Gate against NumPy, and the training of its gates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

import seqmodels
from experiments.analysis.positions import losses_by_position
from experiments.training import gating
from experiments.training.gating import GatingConfig, train_gates
from layers.caches import read_cache
from layers.caches.attention_gate import AttentionGate
from layers.caches.trained import Trained
from layers.mixer import MixerState
from tests.layers.caches import literal, literal_selection
from tests.layers.caches.reading import (
    GROUPS,
    HEADS,
    LENGTHS,
    PROMPT,
    STEPS,
    TIME,
    given,
    inputs,
    layer,
    output,
    positions,
    projected,
)
from tests.seqmodels.test_caching import PROMPTS, VOCAB, hybrid


def gates(features, groups, layers=1, bias=0.0):
    rng = np.random.default_rng(0)

    def one():
        made = {name: 0.2 * rng.normal(size=(features, 2, 3)) for name in ("query", "key", "value")}
        return made | dict(output=rng.normal(size=(2, 3, groups)), bias=np.full(groups, bias))

    return Trained([one() for _ in range(layers)])


def logits_of(arrays, x):
    """z of tokens with features x (t, f), one head and one token after the other."""
    z = np.tile(arrays["bias"].astype(np.float64), (len(x), 1))
    for head in range(arrays["query"].shape[1]):
        a, b, c = (x @ arrays[name][:, head].astype(np.float64) for name in ("query", "key", "value"))
        for i in range(len(x)):
            weights = literal.tempered(a[i], b[: i + 1], 0.0, 1.0)
            z[i] += weights @ c[: i + 1] @ arrays["output"][head]
    return z


def seen(policy, z, ends):
    """The tokens that each key/value head reads at every token, and those that it holds after each of the pieces that end at `ends`."""
    kept, found, held = [[] for _ in range(z.shape[1])], [], {}
    least = np.log(policy.threshold / (1 - policy.threshold))
    for begin, end in zip([0, *ends], ends, strict=False):
        for i in range(begin, end):
            found.append(
                [
                    [j for j in (*kept[g], *range(begin, i + 1)) if j == i or z[j, g] > least]
                    for g in range(z.shape[1])
                ]
            )
        for g in range(z.shape[1]):
            some = [j for j in (*kept[g], *range(begin, end)) if z[j, g] > least]
            kept[g] = literal.largest(z[:, g], policy.budget, some)
        held[end] = list(kept)
    return found, held


@pytest.mark.slow
@pytest.mark.parametrize("budget", [3, 30])
def test_later_queries_see_what_gates_keep(budget, tmp_path):
    made = gates(32, GROUPS)
    made.save(tmp_path / "gates.npz")
    policy = read_cache(
        f"attention_gate(gates='{tmp_path / 'gates.npz'}', budget={budget}, chunk=4, threshold=0.9)"
    )
    assert policy == AttentionGate(gates=made, budget=budget, chunk=4, threshold=0.9)
    # 19 columns in calls of 10 and 9, each in pieces of 4, 4 and 2 or 1; the second row begins at column 6.
    y, outputs, state, _ = given(policy, calls=2)
    ends, hidden = {0: [4, 8, 10, 14, 18, 19], 1: [2, 4, 8, 12, 13]}, 0
    for row, length in enumerate(LENGTHS):
        q, k, v = projected(row)
        t = len(q)
        plain = [literal_selection.turned(x, -np.arange(t)) for x in (q, k)]
        z = logits_of(made.layers[0], np.concatenate([x.reshape(t, -1) for x in (*plain, v)], axis=1))
        tokens, held = seen(policy, z, [*ends[row], *range(length + 1, length + STEPS + 1)])
        there = positions(state.kept.numbers, state.kept.positions, row)
        assert [sorted(one) for one in there] == held[length]
        for now in range(length + STEPS):
            o, _ = literal.outputs(q[now], k, v, tokens[now])
            got = y[row, PROMPT - length + now] if now < length else outputs[row, now - length]
            np.testing.assert_allclose(got, output(o), atol=1e-5)
            hidden += now + 1 - len(tokens[now][0])
    assert 0.2 < hidden / sum(n * (n + 1) / 2 for n in (length + STEPS for length in LENGTHS)) < 0.9


@pytest.mark.slow
def test_gates_of_packed_rows_see_their_segment():
    """A segment that begins within a call, after another one, is read as alone."""
    policy, mixer, x = (
        AttentionGate(gates=gates(32, GROUPS), budget=3, chunk=4),
        layer(),
        jnp.asarray(inputs()),
    )
    empty = mixer.init_state(2, max_length=PROMPT)
    state = MixerState(policy.begin(empty.carried, HEADS, 0), empty.place)
    ids, call, found = jnp.asarray([[1] * 8 + [2] * 11] * 2, jnp.int32), jax.jit(mixer.__call__), []
    for piece in (slice(0, 10), slice(10, PROMPT)):
        y, state = call(x[:, piece], state, segment_ids=ids[:, piece])
        found.append(y)
    q, k, v = (
        np.asarray(one[0], np.float64) for one in mixer.project(x[:1, 8:PROMPT], jnp.arange(11)[None], None)
    )
    plain = [literal_selection.turned(one, -np.arange(11)) for one in (q, k)]
    features = np.concatenate([one.reshape(11, -1) for one in (*plain, v)], axis=1)
    tokens, _ = seen(policy, logits_of(policy.gates.layers[0], features), [2, 6, 10, 11])
    for now, y in enumerate(jnp.concatenate(found, axis=1)[0, 8:]):
        o, _ = literal.outputs(q[now], k, v, tokens[now])
        np.testing.assert_allclose(y, output(o), atol=1e-5)


@pytest.mark.slow
def test_the_loss_of_training_is_that_of_the_policy():
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 14)).astype(np.int32)
    made = gates(32, 2, layers=2, bias=0.3)
    parameters = [jax.tree.map(jnp.asarray, layer) for layer in made.layers]
    loss, share = jax.jit(gating.losses)(hybrid(), parameters, jnp.asarray(tokens))
    policy = AttentionGate(gates=made, budget=13, chunk=14)
    wanted = losses_by_position(hybrid(), tokens[:, :-1], tokens[:, 1:], chunk=13, cache=policy)
    np.testing.assert_allclose(loss, np.mean(wanted), rtol=1e-5)
    whole = losses_by_position(hybrid(), tokens[:, :-1], tokens[:, 1:], chunk=13)
    assert abs(loss - np.mean(whole)) > 1e-2
    assert 0.1 < share < 0.9


@pytest.mark.slow
def test_gradients_pass_straight_through_the_threshold():
    """One layer that reads a row: a bias that grows by d keeps sigmoid'(z) d more tokens of each."""
    mixer, x = layer(), jnp.asarray(inputs())
    arrays = gates(32, GROUPS).layers[0]
    place = mixer.init_state(2, max_length=TIME).place

    def share(bias):
        straight = gating.Straight(arrays | {"bias": jnp.asarray(arrays["bias"]) + bias}, jnp.zeros(()))
        return mixer(x, MixerState(straight, place))[1].carried.share

    z = []
    for row in range(2):
        q, k, v = (
            np.asarray(one[0], np.float64)
            for one in mixer.project(x[row][None], jnp.arange(TIME)[None], None)
        )
        plain = [literal_selection.turned(one, -np.arange(TIME)) for one in (q, k)]
        z.append(logits_of(arrays, np.concatenate([one.reshape(TIME, -1) for one in (*plain, v)], axis=1)))
    chance = expit(np.array(z))
    found, slope = jax.jit(jax.value_and_grad(share))(0.0)
    np.testing.assert_allclose(found, (chance > 0.5).mean(), rtol=1e-6)
    np.testing.assert_allclose(slope, (chance * (1 - chance)).mean(), rtol=1e-4)


@pytest.mark.slow
def test_gates_learn_to_keep_a_share(tmp_path):
    tokens = np.random.default_rng(0).integers(0, VOCAB, (8, 14)).astype(np.int32)
    config = GatingConfig(heads=2, width=4, keep=0.4, steps=120, batch=4, learning_rate=3e-2)
    made, found = train_gates(hybrid(), tokens, config=config)
    assert found.shape == (120, 2)
    assert found[:5, 1].mean() > 0.6
    assert abs(found[-20:, 1].mean() - 0.4) < 0.1
    made.save(tmp_path / "gates.npz")
    policy = f"attention_gate(gates='{tmp_path / 'gates.npz'}', budget=6)"
    assert seqmodels.generate(hybrid(), PROMPTS, max_new_tokens=2, cache=policy).tokens.shape == (3, 2)
