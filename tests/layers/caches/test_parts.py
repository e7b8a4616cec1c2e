"""Policies that keep all tokens, some in fewer bits or channels, and those that choose what is read, against NumPy."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from layers.caches import read_cache
from tests.layers.caches import literal
from tests.layers.caches.reading import (
    GROUPS,
    HEADS,
    LENGTHS,
    PROMPT,
    STEPS,
    given,
    layer,
    output,
    positions,
    projected,
    read_prompt,
)

EACH = HEADS // GROUPS


def check(policy, parts_of, atol=1e-5):
    """Raises unless each step reads the parts that `parts_of(q, k, v, g, length)` gives of a prompt, and the new tokens.

    It returns a function from a query to its parts (query, keys, values).
    """
    _, outputs, *_ = given(policy, calls=2)
    for row, length in enumerate(LENGTHS):
        q, k, v = projected(row)
        parts = [parts_of(q[:length], k[:length], v[:length], g) for g in range(GROUPS)]
        for step in range(STEPS):
            now, o = length + step, np.zeros((HEADS, v.shape[2]))
            new = slice(length, now + 1)
            for head in range(HEADS):
                g, one = head // EACH, q[now, head]
                o[head] = literal.joined([*parts[g](one), (one, k[new, g], v[new, g])], len(one) ** -0.5)
            np.testing.assert_allclose(outputs[row, step], output(o), atol=atol)


@pytest.mark.slow
def test_think():
    policy = read_cache("think(ratio=0.3, window=5, recent=3)")

    def parts_of(q, k, v, g):
        channels = literal.think(policy, q[:, g * EACH : (g + 1) * EACH], k[:, g])
        assert len(channels) == 3
        last = len(q) - policy.recent
        return lambda one: [
            (one[channels], k[:last, g, channels], v[:last, g]),
            (one, k[last:, g], v[last:, g]),
        ]

    check(policy, parts_of)
    # Channels of keys that differ much in size.
    factors = np.array([1.0, 4.0, 0.2, 2.0])
    prompt = read_prompt("think(ratio=0.5, window=5, recent=3)")
    keys, values = prompt.cache.entries
    cache = prompt.cache._replace(
        entries=(keys * jnp.asarray(factors, jnp.float32)[None, None, None], values)
    )
    found = prompt.policy.channels(dataclasses.replace(prompt, cache=cache))
    for row, length in enumerate(LENGTHS):
        q, k = (x[:length] for x in projected(row)[:2])
        wanted = [
            literal.think(prompt.policy, q[:, g * EACH : (g + 1) * EACH], k[:, g] * factors)
            for g in range(GROUPS)
        ]
        assert found[row].tolist() == wanted


@pytest.mark.slow
def test_zipcache():
    policy = read_cache("zipcache(salient=0.4, window=3, random=0.4, seed=2)")

    def parts_of(q, k, v, g):
        t = len(q)
        chance = np.asarray(policy.probes(jnp.arange(t)[None]))[0]
        assert 0 < chance.sum() < t
        probes = [i for i in range(t) if chance[i] or i >= t - 3]
        scores = literal.saliency(q, k, probes)[g]
        high = literal.largest(scores, int(0.4 * t), range(t))
        low = [j for j in range(t) if j not in high]
        factor = np.sqrt(np.abs(v[:, g]).max(0))
        rounded = [
            (literal.by_channel(k[part, g], bits), literal.by_token(v[part, g] / factor, bits) * factor)
            for part, bits in ((high, 4), (low, 2))
        ]
        return lambda one: [(one, *part) for part in rounded]

    check(policy, parts_of, atol=5e-5)


@pytest.mark.slow
def test_mikv():
    policy = read_cache("mikv(budget=5, bits=2)")

    def parts_of(q, k, v, g):
        scores = literal.by_group(literal.causal(q, k).sum(1), GROUPS)[g]
        high = literal.largest(scores, 5, range(len(q)))
        low = [j for j in range(len(q)) if j not in high]
        queries = np.abs(q[:, g * EACH : (g + 1) * EACH]).max((0, 1))
        balance = np.sqrt(queries / np.abs(k[:, g]).max(0))
        keys = literal.by_token(k[low, g] * balance, 2)
        values = literal.by_token(v[low, g], 2)
        return lambda one: [(one, k[high, g], v[high, g]), (one / balance, keys, values)]

    check(policy, parts_of, atol=5e-5)


@pytest.mark.slow
def test_tokenselect():
    policy = read_cache("tokenselect(budget=4, sinks=2, recent=4)")
    _, outputs, *_ = given(policy)
    for row, length in enumerate(LENGTHS):
        q, k, v = projected(row)
        for step in range(STEPS):
            now = length + step
            read = literal.votes(policy, q[now], k[: now + 1])
            assert len(read) == 10
            o, _ = literal.outputs(q[now], k, v, [read] * GROUPS)
            np.testing.assert_allclose(outputs[row, step], output(o), atol=1e-5)


@pytest.mark.slow
def test_kvmerger():
    policy = read_cache("kvmerger(threshold=-0.3, recent=3)")
    prompt = read_prompt("kvmerger(threshold=-0.3, recent=3)")
    (budgets,) = policy.budgets([prompt], [layer().view()])
    _, outputs, kept, _ = given(policy, calls=2)
    for row, length in enumerate(LENGTHS):
        q, k, v = projected(row)
        mass = literal.by_group(literal.causal(q[:length], k[:length]).sum(1), GROUPS)
        entries = [literal.merged(policy, mass[g], k[:length, g], v[:length, g]) for g in range(GROUPS)]
        assert [len(one) for one in entries] == budgets[row].tolist()
        assert max(size for one in entries for *_, size, _ in one) > 2
        pivots = [[pivot for *_, pivot in one] for one in entries]
        assert positions(kept.numbers, kept.positions, row) == pivots
        for step in range(STEPS):
            now, o = length + step, np.zeros((HEADS, v.shape[2]))
            for head in range(HEADS):
                keys, values, sizes, _ = map(np.array, zip(*entries[head // EACH], strict=True))
                g, new = head // EACH, slice(length, now + 1)
                keys, values = np.concatenate([keys, k[new, g]]), np.concatenate([values, v[new, g]])
                powers = np.exp(keys @ q[now, head] / np.sqrt(keys.shape[1]))
                powers[: len(sizes)] *= sizes
                o[head] = powers / powers.sum() @ values
            np.testing.assert_allclose(outputs[row, step], output(o), atol=1e-5)


def test_sirllm():
    policy, prompt = (
        read_cache("sirllm(budget=8, sinks=2, recent=3)"),
        read_prompt("sirllm(budget=8, sinks=2, recent=3)"),
    )
    surprise = np.random.default_rng(0).normal(size=(2, PROMPT)).astype(np.float32)
    (kept,) = policy.compressed([prompt], [layer().view()], room=1, surprise=jnp.asarray(surprise))
    for row, length in enumerate(LENGTHS):
        wanted = literal.largest(surprise[row], 3, range(2, length - 3))
        assert (
            positions(kept.numbers, kept.positions, row)
            == [[0, 1, *wanted, *range(length - 3, length)]] * GROUPS
        )
