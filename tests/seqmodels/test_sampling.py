"""Filters of logits against literal NumPy, and samples against the distribution that they come from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from seqmodels import sampling

VOCAB = 9
ROWS = np.random.default_rng(0).normal(0, 2, (5, VOCAB)).astype(np.float32)
SEEN = np.random.default_rng(1).integers(0, 2, ROWS.shape).astype(bool)


def made(**options):
    return sampling.make_sampling(vocab_size=VOCAB, **options)


def literal(logits, seen, *, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0):
    """The probabilities of one row, token by token."""
    logits = [
        (x / repetition_penalty if x > 0 else x * repetition_penalty) if was else x
        for x, was in zip(logits.astype(float), seen, strict=True)
    ]
    weights = np.exp(np.asarray(logits) / temperature)
    order = [int(token) for token in np.argsort(-weights)]
    if top_k is not None:
        order = order[:top_k]
    if top_p is not None:
        whole, total, kept = sum(weights[order]), 0.0, []
        for token in order:
            kept.append(token)
            total += weights[token] / whole
            if total >= top_p:
                break
        order = kept
    if min_p is not None:
        order = [token for token in order if weights[token] >= min_p * weights[order[0]]]
    chances = np.zeros(VOCAB)
    chances[order] = weights[order] / sum(weights[order])
    return chances


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0.7),
        dict(top_k=1),
        dict(top_k=4),
        dict(top_p=0.1),
        dict(top_p=0.8),
        dict(min_p=0.2),
        dict(min_p=1.0),
        dict(repetition_penalty=1.8),
        dict(repetition_penalty=0.5, temperature=2.0, top_k=6, top_p=0.9, min_p=0.05),
    ],
)
def test_filters_are_those_of_the_papers(options):
    found = jax.nn.softmax(sampling.filtered(jnp.asarray(ROWS), made(**options), jnp.asarray(SEEN)), axis=-1)
    wanted = [literal(logits, seen, **options) for logits, seen in zip(ROWS, SEEN, strict=True)]
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_tokens_of_equal_logit_stay_together():
    tied = jnp.asarray([[2.0, 0.0, 2.0, 1.0]])
    for options in (dict(top_k=1), dict(top_p=0.01), dict(min_p=1.0)):
        kept = np.isfinite(sampling.filtered(tied, sampling.make_sampling(vocab_size=4, **options)))
        assert kept.tolist() == [[True, False, True, False]]


def test_options_that_change_nothing_are_not_computed():
    assert made(top_k=VOCAB, top_p=1, min_p=0, repetition_penalty=1) == (None, 1.0, None, None, None)


def test_samples_have_the_frequencies_of_the_distribution():
    count, options = 20_000, dict(temperature=1.5, top_k=6, top_p=0.95)
    keys = jax.random.split(jax.random.key(3), count)
    logits = jnp.broadcast_to(jnp.asarray(ROWS[:1]), (count, VOCAB))
    tokens, chances = jax.jit(sampling.choose)(logits, made(**options), keys)
    wanted = literal(ROWS[0], SEEN[0], **options)
    counts = np.bincount(tokens, minlength=VOCAB)
    assert (counts[wanted == 0] == 0).all()
    assert chisquare(counts[wanted > 0], count * wanted[wanted > 0]).pvalue > 0.01
    plain = literal(ROWS[0], SEEN[0])
    np.testing.assert_allclose(chances, np.log(plain)[tokens], atol=1e-5)


def test_a_tiny_temperature_is_greedy_and_finite():
    keys = jax.random.split(jax.random.key(0), len(ROWS))
    for options in (dict(temperature=1e-30), dict(temperature=0)):
        tokens, chances = sampling.choose(jnp.asarray(ROWS), made(**options), keys)
        assert tokens.tolist() == ROWS.argmax(1).tolist()
        assert np.isfinite(chances).all()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(temperature=-1), "temperature=-1; expected a finite number of at least 0"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(top_k=0), "top_k=0; expected an integer from 1 to 9, as vocab_size=9"),
        (dict(top_k=10), "top_k=10"),
        (dict(top_k=2.5), r"top_k=2\.5"),
        (dict(top_p=0), "top_p=0; expected a number above 0 and at most 1"),
        (dict(top_p=1.1), r"top_p=1\.1"),
        (dict(min_p=-0.1), r"min_p=-0\.1; expected a number from 0 to 1"),
        (dict(repetition_penalty=0), "repetition_penalty=0; expected a finite number above 0"),
        (dict(temperature=0, top_k=3, min_p=0.1), r"so top_k=3, min_p=0\.1 has no effect"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        made(**options)
