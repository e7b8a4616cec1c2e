"""The search of spans of heads: influences are what hiding does to the loss, and the choice is the best of all."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqmodels
from layers.caches.perturbed import Perturbing
from seqmodels import caching, spans
from tests.seqmodels.test_caching import NEW, PROMPTS, VOCAB, hybrid

TIME = 10


@pytest.mark.slow
def test_influences_are_changes_of_the_loss():
    """Each query turns by a small part from a token to its other ones, which takes passes over the row, beside gradients."""
    model, row = hybrid(), np.random.default_rng(0).integers(0, VOCAB, TIME).astype(np.int32)
    tokens, begun = jnp.asarray(row)[None], caching.begin(model, Perturbing(), 1, TIME)
    run = jax.jit(lambda added: spans.loss(model, tokens, caching.with_carried(begun, added)))
    carried = {layer: begun.layers[layer].carried for layer in (0, 2)}
    _, state = run(carried)
    for layer, influence in zip(carried, spans.influences(model, row), strict=True):
        weights = np.asarray(state.layers[layer].carried.weights, np.float64)[0]
        assert np.isfinite(influence).all()
        for group, i, j in itertools.product(range(2), range(1, TIME), range(0, TIME, 2)):
            if j > i:
                continue
            losses = []
            for part in (-0.01, 0.01):
                added = np.zeros((1, 4, TIME, TIME), np.float32)
                for head in (2 * group, 2 * group + 1):
                    gone = weights[head, i, j]
                    added[0, head, i] = np.log(1 + part * gone / (1 - gone))
                    added[0, head, i, j] = np.log(1 - part)
                changed = dataclasses.replace(carried[layer], added=jnp.asarray(added))
                losses.append(float(run(carried | {layer: changed})[0]))
            change = (losses[1] - losses[0]) / 0.02
            np.testing.assert_allclose(influence[group, i, j], change, rtol=0.02, atol=5e-4)


def test_what_a_rule_hides():
    influence = np.random.default_rng(0).normal(size=(2, 6, 6))
    # Spans of rules for rows of 0 to 6 tokens.
    table = np.array([[2, 2], [2, 2], [2, 2], [2, 3], [2, 4], [2, 4], [2, 5]])
    found = spans.hidden(influence, table, sinks=1)
    for g, rule in itertools.product(range(2), range(2)):
        wanted = 0.0
        for i in range(6):
            for j in range(i + 1):
                if j >= 1 and i - j >= table[i + 1, rule] - 1:
                    wanted += influence[g, i, j]
        np.testing.assert_allclose(found[g, rule], wanted)


def test_the_choice_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for sizes, most in (([2, 4, 6], 18), ([3, 5, 9], 24), ([1, 2, 7], 11)):
        costs = rng.normal(size=(4, 3)) + np.array([1.0, 0.5, 0.0])
        chosen = spans.choose(costs, np.array(sizes), most)
        every = itertools.product(range(3), repeat=4)
        fits = [one for one in every if sum(sizes[rule] for rule in one) <= most]
        best = min(fits, key=lambda one: sum(costs[g, rule] for g, rule in enumerate(one)))
        assert chosen == list(best)


@pytest.mark.slow
def test_spans_that_are_found_are_those_of_a_policy(tmp_path):
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, TIME)).astype(np.int32)
    options = dict(rules=[(3, 0.0), (1, 0.5), (0, 1.0)], sinks=1, least=2)
    found = spans.search(hybrid(), tokens, density=0.6, **options)
    assert [len(layer) for layer in found[0]] == [2, 2]
    sizes = [3 if beta == 0 else 1 + TIME // 2 if beta == 0.5 else TIME for beta in np.ravel(found[1])]
    assert sum(sizes) <= 0.6 * TIME * 4
    rows = [spans.influences(hybrid(), row) for row in tokens]
    costs = np.concatenate(
        [
            np.mean([spans.hidden(row[layer], _table(options["rules"]), 1) for row in rows], axis=0)
            for layer in range(2)
        ]
    )
    chosen = spans.choose(costs, np.array([3, 6, 10]), 24)
    assert [options["rules"][rule][1] for rule in chosen] == list(np.ravel(found[1]))
    for name, numbers in zip(("alphas", "betas"), found, strict=True):
        (tmp_path / f"{name}.json").write_text(json.dumps(numbers))
    policy = f"moa(alphas='{tmp_path / 'alphas.json'}', betas='{tmp_path / 'betas.json'}', sinks=1, least=2)"
    new = seqmodels.generate(hybrid(), PROMPTS, max_new_tokens=NEW, cache=policy)
    assert new.lengths.tolist() == [NEW] * 3


def _table(rules):
    """Spans of at least 2 tokens for rows of 0 to TIME tokens."""
    return np.array([[max(2, int(a + b * n)) for a, b in rules] for n in range(TIME + 1)])
