"""Decoding with a draft model gives the greedy tokens of decoding without, and samples of the same distribution."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

import seqmodels
from seqmodels.sampling import make_sampling, verified
from tests.seqmodels.test_generation import MODEL, SMALL, made, small
from tests.seqmodels.test_speculative import LONG, PROMPTS, check_same, model_of

WORDS, NEW, ROWS = 4, 3, 6000


@functools.cache
def other(**changes):
    """A model with other parameters."""
    model = seqmodels.build_model(SMALL | changes, rngs=nnx.Rngs(5))
    model.head.kernel[...] = 8 * model.head.kernel[...]
    return model


@functools.cache
def attention():
    return made(MODEL | dict(depth=1, pattern=("attention",), mixers={"attention": dict(heads=2)}))


@pytest.mark.slow
def test_greedy_tokens_are_those_without_a_draft():
    settings = dict(max_new_tokens=10, block=8, temperature=0)
    check_same(small(), PROMPTS, settings, draft=other(), draft_tokens=3)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [("mamba2", "attention"), ("gated_deltanet", "hyena", "s5")])
def test_states_of_any_kind(pattern):
    """The draft model has a cache that does not grow, and a row is stopped while others go on."""
    model = model_of(pattern)
    settings = dict(LONG, temperature=0, repetition_penalty=1.2, stop=[[12] * 5, [1, 2]])
    draft = dict(draft=attention(), draft_cache="streaming(budget=6, sinks=1)", draft_tokens=4)
    plain, _ = check_same(model, PROMPTS, settings, **draft)
    stops = [[12] * 5, plain.tokens[1, 20:22].tolist()]
    _, ended = check_same(model, PROMPTS, settings | dict(stop=stops), **draft)
    assert ended.lengths.min() < 40


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [dict(temperature=0), dict(temperature=1.5, top_k=9, top_p=0.9, repetition_penalty=1.5)]
)
def test_a_draft_of_the_model_itself_is_right(options):
    """Under filters and a penalty too, which tokens of the draft itself count for."""
    new = seqmodels.generate(
        small(), PROMPTS, draft=small(), draft_tokens=3, max_new_tokens=24, block=24, **options
    )
    assert new.lengths.tolist() == [24] * 3
    assert new.calls <= 7  # 6 but for rounding


def check_counts(counts, chances):
    """Raises if counts are unlikely to be those of samples with these probabilities (chi-squared)."""
    counts, chances = counts.reshape(-1), chances.reshape(-1)
    assert counts[chances == 0].sum() == 0
    rare = chances * counts.sum() < 5
    both = [np.append(x[~rare], x[rare].sum()) for x in (counts, chances * counts.sum())]
    both = [x[both[1] > 0] for x in both]
    assert stats.chisquare(both[0], both[1] * (both[0].sum() / both[1].sum())).pvalue > 1e-3


def test_verified_guesses_are_samples_of_the_model():
    rng, rows = np.random.default_rng(0), 20000
    logits, likely = (1.5 * rng.normal(size=5) for _ in range(2))
    sampling, there = make_sampling(vocab_size=5, temperature=0.7), np.arange(rows) % 4 != 0

    @jax.jit
    def sampled(logits, likely):
        logits, likely = (jnp.broadcast_to(x.astype(jnp.float32), (rows, 5)) for x in (logits, likely))
        keys = jax.random.split(jax.random.key(0), (3, rows))
        guess = jax.vmap(jax.random.categorical)(keys[0], likely).astype(jnp.int32)
        given = dict(guess=guess, likely=likely, there=jnp.asarray(there), accepting=keys[2])
        return guess, *verified(logits, sampling, keys[1], **given)

    guess, tokens, chances = map(np.asarray, sampled(logits, likely))
    p, q, whole = (np.exp(x) / np.exp(x).sum() for x in (logits / 0.7, likely, logits))
    assert np.abs(p - q).sum() > 0.3
    for some in (there, ~there):
        check_counts(np.bincount(tokens[some], minlength=5), p)
    # As often as it can it is the guess.
    assert abs(np.mean((tokens == guess)[there]) - np.minimum(p, q).sum()) < 0.015
    np.testing.assert_allclose(chances, np.log(whole)[tokens], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [dict(temperature=1.0), dict(temperature=1.6, top_k=3, repetition_penalty=1.7)]
)
def test_samples_have_the_distribution_of_the_model(options):
    """All texts of three tokens over a vocabulary of four, with their probabilities by full passes."""
    words = dict(vocab_size=WORDS)
    model = made(SMALL | words)
    prompt = [1, 2, 0]
    settings = dict(max_new_tokens=NEW, block=NEW, seed=7) | options
    new = seqmodels.generate(model, [prompt] * ROWS, draft=other(**words), draft_tokens=2, **settings)
    counts = np.zeros((WORDS,) * NEW)
    np.add.at(counts, tuple(new.tokens.T), 1)
    chances = np.zeros(counts.shape)
    texts = np.array(list(itertools.product(range(WORDS), repeat=NEW)))
    rows = jnp.asarray(np.concatenate([[prompt] * len(texts), texts], axis=1), jnp.int32)
    logits = np.asarray(model(rows)[0], np.float64)
    for text, rows in zip(texts, logits, strict=True):
        chance, seen = 1.0, set(prompt)
        for token, row in zip(text, rows[len(prompt) - 1 :], strict=False):
            penalty = options.get("repetition_penalty", 1.0)
            row = np.array(
                [x * (penalty if x < 0 else 1 / penalty) if j in seen else x for j, x in enumerate(row)]
            )
            row = np.exp((row - row.max()) / options["temperature"])
            row[row < np.sort(row)[-options.get("top_k", WORDS)]] = 0
            chance *= row[token] / row.sum()
            seen.add(token)
        chances[tuple(text)] = chance
    check_counts(counts, chances)
    # The draft model alone has another distribution, which the same counts tell apart.
    alone = seqmodels.generate(other(**words), [prompt] * ROWS, **settings)
    counts = np.zeros((WORDS,) * NEW)
    np.add.at(counts, tuple(alone.tokens.T), 1)
    with pytest.raises(AssertionError):
        check_counts(counts, chances)
