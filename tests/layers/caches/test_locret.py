"""Locret against NumPy, and the training of its heads."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import seqmodels
from experiments.training import retaining
from experiments.training.retaining import RetainingConfig, train_heads
from layers.caches import read_cache
from layers.caches.locret import Locret
from layers.caches.trained import Trained
from layers.caches.watching import Watching
from tests.layers.caches import literal, literal_selection
from tests.layers.caches.reading import GROUPS, LENGTHS, PROMPT, STEPS, given, output, projected
from tests.seqmodels.test_caching import NEW, PROMPTS, VOCAB, hybrid


def heads(features, groups, layers=1, hidden=6):
    rng = np.random.default_rng(0)
    return Trained(
        [
            dict(first=rng.normal(size=(features, hidden)), second=rng.normal(size=(hidden, groups)))
            for _ in range(layers)
        ]
    )


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.slow
def test_tokens_of_largest_scores_stay(tmp_path):
    made = heads(32, GROUPS)
    made.save(tmp_path / "heads.npz")
    policy = read_cache(f"locret(heads='{tmp_path / 'heads.npz'}', budget=6, recent=2, chunk=4)")
    assert policy == Locret(heads=made, budget=6, recent=2, chunk=4)
    assert hash(policy) == hash(Locret(heads=made, budget=6, recent=2, chunk=4))
    # 19 columns in calls of 10 and 9, each in pieces of 4, 4 and 2 or 1; the second row begins at column 6.
    y, outputs, *_ = given(policy, calls=2)
    ends = {0: [4, 8, 10, 14, 18, 19], 1: [2, 4, 8, 12, 13]}
    for row, length in enumerate(LENGTHS):
        q, k, v = projected(row)
        t = len(q)
        plain = [literal_selection.turned(x, -np.arange(t)) for x in (q, k)]
        features = np.concatenate([x.reshape(t, -1) for x in (*plain, v)], axis=1)
        scores = silu(features @ made.layers[0]["first"]) @ made.layers[0]["second"]
        held = literal_selection.locret(
            policy, scores, length, [*ends[row], *range(length + 1, length + STEPS + 1)]
        )
        for now in range(length + STEPS):
            o, _ = literal.outputs(q[now], k, v, held[now])
            got = y[row, PROMPT - length + now] if now < length else outputs[row, now - length]
            np.testing.assert_allclose(got, output(o), atol=1e-5)
        assert len(held[-1][0]) == 7


@pytest.mark.slow
def test_a_budget_of_all_tokens_changes_nothing():
    policy = Locret(heads=heads(32, 2, layers=2), budget=15, recent=4, chunk=6)
    settings = dict(max_new_tokens=NEW, temperature=0, chunk=16, block=8)
    wanted = seqmodels.generate(hybrid(), PROMPTS, **settings)
    found = seqmodels.generate(hybrid(), PROMPTS, cache=policy, **settings)
    assert found.tokens.tolist() == wanted.tokens.tolist()
    np.testing.assert_allclose(found.log_probabilities, wanted.log_probabilities, atol=1e-5)


@pytest.mark.slow
def test_heads_learn_what_answers_attend_to(tmp_path):
    tokens = np.random.default_rng(0).integers(0, VOCAB, (8, 14)).astype(np.int32)
    config = RetainingConfig(hidden=16, steps=150, batch=4, learning_rate=3e-2, warmup=10)
    made, losses = train_heads(hybrid(), tokens, prompt=10, config=config)
    assert losses[-10:].mean() < 0.2 * losses[:10].mean()
    # The scores of a row, with the largest products of the answer's queries in NumPy.
    mixer = hybrid().stack.block(0)
    x, _ = hybrid().embedding(jnp.asarray(tokens[:1]), None, segment_ids=None)
    q, k, v = (
        np.asarray(x[0], np.float64)
        for x in mixer.mixer.project(mixer.mixer_norm(x), jnp.arange(14)[None], None)
    )
    target = np.max(
        [[k[:10, h // 2] @ q[i, h] / np.sqrt(4) for h in range(4)] for i in range(10, 14)], axis=0
    )
    target = np.stack([target[:2].max(0), target[2:].max(0)], axis=1)
    plain = [literal_selection.turned(x[:10], -np.arange(10)) for x in (q, k)]
    features = np.concatenate([x.reshape(10, -1) for x in (*plain, v[:10])], axis=1)
    watching = Watching(length=14)
    found = retaining._attention(hybrid(), jnp.asarray(tokens[:1]), watching, 10)[0]
    np.testing.assert_allclose(found[0][0], features, atol=1e-5)
    np.testing.assert_allclose(found[1][0], target, atol=1e-5)
    scores = silu(features @ made.layers[0]["first"]) @ made.layers[0]["second"]
    assert np.square(scores - target).mean() < 0.5 * np.square(target - target.mean(0)).mean()
    made.save(tmp_path / "heads.npz")
    policy = f"locret(heads='{tmp_path / 'heads.npz'}', budget=6, recent=2)"
    assert seqmodels.generate(hybrid(), PROMPTS, max_new_tokens=2, cache=policy).tokens.shape == (3, 2)


@pytest.mark.slow
def test_the_loss_is_the_paper_s():
    """Two layers of one and two heads, in NumPy."""
    rng = np.random.default_rng(0)
    sizes = (6, 1), (8, 2)
    parameters = [dict(first=rng.normal(size=(f, 5)), second=rng.normal(size=(5, g))) for f, g in sizes]
    given = [(rng.normal(size=(2, 7, f)), 2 * rng.normal(size=(2, 7, g))) for f, g in sizes]
    wanted, changes = [], 0.0
    for arrays, (features, target) in zip(parameters, given, strict=True):
        scores = silu(features @ arrays["first"]) @ arrays["second"]
        off = np.abs(scores - target)
        wanted += list(np.where(off < 1, off**2 / 2, off - 0.5).mean((0, 1)))
        changes += np.square(np.diff(scores, axis=1)).mean()
    to_float32 = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)  # noqa: E731
    parameters, given = to_float32(parameters), to_float32(given)
    optimizer = optax.sgd(0.1)
    found = retaining._step(optimizer, 0.7, parameters, optimizer.init(parameters), given)[2]
    np.testing.assert_allclose(found, np.mean(wanted) + 0.7 * changes, rtol=1e-5)


def test_arrays_are_read_as_they_were_saved(tmp_path):
    made = heads(4, 2, layers=11)
    made.save(tmp_path / "heads.npz")
    text = f"locret(heads='{tmp_path / 'heads.npz'}')"
    assert read_cache(text).heads == made
    assert made != heads(4, 2, layers=10)
    assert jax.tree.map(np.shape, read_cache(text).heads.layers[10]) == dict(first=(4, 6), second=(6, 2))
