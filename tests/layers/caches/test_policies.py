"""Policies against their equations in NumPy: which tokens they keep, and what new tokens read of them."""

import numpy as np
import pytest

from layers.caches import read_cache
from tests.layers.caches import literal
from tests.layers.caches.reading import (
    GROUPS,
    LENGTHS,
    PROMPT,
    STEPS,
    given,
    layer,
    plain,
    positions,
    projected,
)


def output(o):
    return o.reshape(-1) @ np.asarray(layer().output.kernel[...], np.float64)


def check_steps(policy, found, first, evict=None):
    """Raises unless every step reads what is kept and its own token, and keeps what `evict` does.

    Args:
      found: what `given` returns.
      first: per row, the tokens of the prompt that each head keeps, and its scores.
      evict: (scores, tokens of a head, what it received, number of the token) -> tokens; None where new tokens are added.
    """
    _, outputs, kept, after = found
    for row, length in enumerate(LENGTHS):
        tokens, scores = first[row]
        assert positions(kept.numbers, kept.positions, row) == tokens
        q, k, v = projected(row)
        for step in range(STEPS):
            now = length + step
            tokens = [[*head, now] for head in tokens]
            o, p = literal.outputs(q[now], k, v, tokens)
            np.testing.assert_allclose(outputs[row, step], output(o), atol=1e-5)
            if evict is not None:
                each = len(p) // GROUPS
                for g in range(GROUPS):
                    received = np.mean(p[g * each : (g + 1) * each], axis=0)
                    np.add.at(scores[g], tokens[g], received)
                    tokens[g] = evict(scores[g], tokens[g], now)
            there = positions(after[0][step], after[1][step], row)
            assert list(map(sorted, there)) == tokens


@pytest.mark.parametrize("pooling", ["mean", pytest.param("max", marks=pytest.mark.slow)])
def test_snapkv(pooling):
    policy = read_cache(f"snapkv(budget=9, window=4, kernel=3, pooling={pooling})")
    found = given(policy, calls=2)
    np.testing.assert_allclose(found[0], plain()[:, :PROMPT], atol=1e-5)
    first = [(literal.snapkv(policy, *(x[:n] for x in projected(row)[:2])), None) for row, n in enumerate(LENGTHS)]
    check_steps(policy, found, first)


def test_h2o():
    policy = read_cache("h2o(budget=7, recent=3)")
    first = []
    for row, length in enumerate(LENGTHS):
        kept, mass = literal.h2o(policy, *(x[:length] for x in projected(row)[:2]))
        first.append((kept, np.pad(mass, ((0, 0), (0, STEPS)))))

    def evict(scores, tokens, now):
        return literal.heavy(scores, tokens, policy.budget, policy.last, now)

    check_steps(policy, given(policy), first, evict)
