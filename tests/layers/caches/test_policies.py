"""Policies against their equations in NumPy: which tokens they keep, and what new tokens read of them."""

import jax.numpy as jnp
import numpy as np
import pytest

from layers.caches import read_cache
from layers.caches.cake import Cake
from layers.caches.keyformer import gumbel
from layers.caches.rounding import restored, round_to
from tests.layers.caches import literal
from tests.layers.caches.reading import (
    GROUPS,
    HEADS,
    LENGTHS,
    PROMPT,
    STEPS,
    given,
    ids,
    inputs,
    layer,
    output,
    plain,
    positions,
    projected,
    read_prompt,
)


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


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_snapkv(pooling):
    policy = read_cache(f"snapkv(budget=9, window=4, kernel=3, pooling={pooling})")
    found = given(policy, calls=2)
    np.testing.assert_allclose(found[0], plain()[:, :PROMPT], atol=1e-5)
    first = [
        (literal.snapkv(policy, *(x[:n] for x in projected(row)[:2])), None) for row, n in enumerate(LENGTHS)
    ]
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


@pytest.mark.slow
def test_keyformer():
    policy = read_cache("keyformer(budget=7, recent=3, tau=0.8, growth=0.3, noise=0.7, seed=5)")
    first, noises = [], []
    for row, length in enumerate(LENGTHS):
        # The noise of every pair of tokens of the row; `gumbel` numbers the rows.
        places = jnp.tile(jnp.arange(length + STEPS)[None, :, None], (row + 1, 1, GROUPS))
        noise = policy.noise * np.asarray(gumbel(policy.seed, places[..., 0], places, HEADS), np.float64)[row]
        q, k = (x[:length] for x in projected(row)[:2])
        scores = literal.keyformer(policy, noise, q, k)
        kept = [literal.heavy(head, range(length), 7, 3, length - 1) for head in scores]
        first.append((kept, np.pad(scores, ((0, 0), (0, STEPS)))))
        noises.append(noise)
    _, _, kept, after = given(policy)
    for row, length in enumerate(LENGTHS):
        tokens, scores = first[row]
        assert positions(kept.numbers, kept.positions, row) == tokens
        q, k, _ = projected(row)
        for step in range(STEPS):
            now, tau = length + step, policy.tau + policy.growth * (step + 1)
            for g in range(GROUPS):
                seen = [*tokens[g], now]
                heads = range(g * HEADS // GROUPS, (g + 1) * HEADS // GROUPS)
                scores[g, seen] += np.mean(
                    [literal.tempered(q[now, h], k[seen, g], noises[row][h, now, seen], tau) for h in heads],
                    axis=0,
                )
                tokens[g] = literal.heavy(scores[g], seen, 7, 3, now)
            there = positions(after[0][step], after[1][step], row)
            assert list(map(sorted, there)) == tokens
            for g, head in enumerate(there):
                live = np.asarray(after[0][step])[row, :, g] != 0
                mass = np.asarray(after[2]["mass"][step])[row, live, g]
                np.testing.assert_allclose(mass, scores[g][head], atol=1e-4)


@pytest.mark.slow
def test_noise_of_keyformer_is_that_of_gumbel():
    places = jnp.tile(jnp.arange(64)[None, :, None], (2, 1, 2))
    noise = np.asarray(gumbel(0, places[..., 0], places, 4))
    assert noise.shape == (2, 4, 64, 64)
    np.testing.assert_allclose(noise.mean(), np.euler_gamma, atol=0.02)
    np.testing.assert_allclose(noise.var(), np.pi**2 / 6, atol=0.05)
    assert len(np.unique(noise)) > 0.99 * noise.size
    # Fewer queries and keys have the noise that they have among more.
    np.testing.assert_array_equal(
        gumbel(0, places[..., 0][:1, 5:9], places[:1, :20], 4), noise[:1, :, 5:9, :20]
    )


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_kivi(bits):
    policy = read_cache(f"kivi(bits={bits}, group=4, residual=8)")
    _, outputs, *_ = given(policy)
    for row, length in enumerate(LENGTHS):
        q, k, v = projected(row)
        for step in range(STEPS):
            now = length + step
            keys, values = literal.kivi(policy, k[: now + 1], v[: now + 1])
            o, _ = literal.outputs(q[now], keys, values, [list(range(now + 1))] * GROUPS)
            np.testing.assert_allclose(outputs[row, step], output(o), atol=2e-5)


@pytest.mark.slow
def test_bits_are_packed_in_bytes():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 8)))
    for bits in (2, 4, 8):
        made = round_to(x, bits, axis=1)
        assert made.codes.shape == (3, 5, bits)
        assert made.codes.dtype == np.uint8
        wanted = np.stack([np.apply_along_axis(literal.rounded, 0, one, bits) for one in x])
        np.testing.assert_allclose(restored(made, bits), wanted, atol=1e-6)


def test_budgets_of_layers_and_heads():
    model = layer()
    prompt = read_prompt("pyramidkv(budget=9, window=4, beta=3.0)")
    found = prompt.policy.budgets([prompt] * 3, [model.view()] * 3)
    for row, length in enumerate(LENGTHS):
        assert [int(one[row, 0]) for one in found] == literal.pyramid(9, 4, 3, 3, length)
    policy = read_cache("headkv(importance=[[1, 3], [2, 2]], budget=14, window=4, beta=1.25)")
    # B = 10: 8 of 10 tokens by importance and 2 for all; 4 heads of which the first has 1 / 8.
    assert [one[0].tolist() for one in policy.budgets([prompt] * 2, [model.view()] * 2)] == [
        [10, 18],
        [14, 14],
    ]


def test_gates_choose_heads():
    gates = "gates=[[0.1, 0.5], [0.5, 0.9]]"
    half = read_cache(f"duoattention({gates}, sparsity=0.5)")
    assert [half.retrieval(0), half.retrieval(1)] == [(1,), (0, 1)]
    assert read_cache(f"duoattention({gates}, sparsity=0.0)").retrieval(0) == (0, 1)
    assert read_cache(f"duoattention({gates}, sparsity=1.0)").retrieval(1) == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "cake(budget=9, window=4, kernel=1)",
        "headkv(importance=[[1, 3]], budget=9, window=4, kernel=3, beta=1.0)",
    ],
)
def test_budgets_choose_tokens(text):
    policy = read_cache(text)
    prompt = read_prompt(text)
    budgets = policy.budgets([prompt], [layer().view()])
    (kept,) = policy.compressed([prompt], [layer().view()], room=1, budgets=budgets, counts=[PROMPT])
    for row, length in enumerate(LENGTHS):
        q, k = (x[:length] for x in projected(row)[:2])
        before = literal.causal(q, k)[:, -4:, : length - 4]
        if text.startswith("cake"):
            (wanted,), (scores,) = literal.cake(9, 4, policy.gamma, [before])
            count, scores = [wanted] * GROUPS, literal.by_group(scores, GROUPS)
        else:
            count, scores = (
                [4 + round(2 * 5 / 4), 4 + round(2 * 15 / 4)],
                literal.by_group(before.sum(1), GROUPS),
            )
        scores = [literal.pooled(head, policy.kernel, policy.pooling) for head in scores]
        found = np.asarray(policy.scores(prompt, layer().view()))[row, : length - 4]
        np.testing.assert_allclose(found, np.stack(scores, axis=1), rtol=1e-4)
        window = list(range(length - 4, length))
        wanted = [
            literal.largest(head, n - 4, range(length - 4)) + window
            for head, n in zip(scores, count, strict=True)
        ]
        assert positions(kept.numbers, kept.positions, row) == wanted


@pytest.mark.slow
def test_cake_gives_layers_what_they_need(monkeypatch):
    """Three layers whose attention differs, one of which wants more than the prompt has."""
    rng, before = np.random.default_rng(0), PROMPT - 4
    attention = [rng.dirichlet(np.full(before, spread), (HEADS, 4)) for spread in (1.0, 0.05, 3.0)]
    given = iter(attention)
    monkeypatch.setattr(Cake, "_before", lambda *_: jnp.stack([jnp.asarray(next(given))] * 2))
    prompt = read_prompt("cake(budget=12, window=4)")
    budgets = prompt.policy.budgets([prompt] * 3, [layer().view()] * 3)
    found = [int(one[0, 0]) for one in budgets]
    wanted, _ = literal.cake(12, 4, 200.0, attention)
    assert found == wanted
    assert max(found) == PROMPT
    assert 3 * 12 - 3 < sum(found) <= 3 * 12  # shares are rounded down


@pytest.mark.slow
@pytest.mark.parametrize("distance", ["cache", "window"])
def test_streaming_is_the_mixer_with_sinks(distance):
    """The mixer has a window of its own and reads all tokens without a state; distances to sinks are bounded."""
    windowed = layer(window=5, sink_tokens=2, sink_distance=distance)
    padded = np.concatenate([ids(), np.ones((2, STEPS), np.int32)], axis=1)
    wanted = np.asarray(windowed(jnp.asarray(inputs()), segment_ids=jnp.asarray(padded))[0])
    y, outputs, *_ = given(read_cache(f"streaming(budget=7, sinks=2, distance={distance})"), calls=3)
    np.testing.assert_allclose(np.concatenate([y, outputs], axis=1), wanted, atol=1e-5)
    assert np.abs(wanted - plain()).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    ["streaming(budget=7, sinks=2, distance=true)", "duoattention(gates=[[0.2, 0.9]], sinks=2, recent=5)"],
)
def test_policies_that_are_masks(text):
    """What a query of a prompt and a new token see is a mask of positions."""
    policy = read_cache(text)
    y, outputs, *_ = given(policy, calls=3)
    for row, length in enumerate(LENGTHS):
        q, k, v = projected(row)
        for now in range(length + STEPS):
            ends = [j for j in range(now + 1) if j < 2 or j > now - 5]
            seen = [ends, ends if text[0] == "s" else list(range(now + 1))]
            o, _ = literal.outputs(q[now], k, v, seen)
            got = y[row, PROMPT - length + now] if now < length else outputs[row, now - length]
            np.testing.assert_allclose(got, output(o), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("calls", [1, 3])
def test_moa(calls):
    """Spans of a growing and of a fixed head, which evict what leaves them."""
    alphas, betas = (-2.0, 5.0), (0.6, 0.0)
    policy = read_cache(f"moa(alphas=[{list(alphas)}], betas=[{list(betas)}], sinks=2, least=4)")
    y, outputs, kept, after = given(policy, calls=calls)

    def seen(now, total):
        """The tokens that each key/value head reads at a token, in a row of so many."""
        spans = [max(4, int(np.floor(a + b * total))) for a, b in zip(alphas, betas, strict=True)]
        return [[j for j in range(now + 1) if j < 2 or now - j < span - 2] for span in spans]

    for row, length in enumerate(LENGTHS):
        q, k, v = projected(row)
        for now in range(length + STEPS):
            tokens = seen(now, now + 1 if now < length else length + STEPS)
            o, _ = literal.outputs(q[now], k, v, tokens)
            got = y[row, PROMPT - length + now] if now < length else outputs[row, now - length]
            np.testing.assert_allclose(got, output(o), atol=1e-5)
        # What the next token sees is held, and nothing else from the first step on.
        whole = [[j for j in one if j < length + STEPS] for one in seen(length + STEPS, length + STEPS)]
        assert [sorted(one) for one in positions(after[0][-1], after[1][-1], row)] == whole
        assert [len(one) for one in positions(kept.numbers, kept.positions, row)] == [
            min(length, len(one)) for one in seen(10**6, length + STEPS)
        ]
    # The longest row has spans of 11 and 5 tokens, and one slot more for a new token.
    assert kept.slots == 12
