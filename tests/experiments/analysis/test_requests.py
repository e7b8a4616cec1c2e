"""Answers of a small model to the requests of evaluation harnesses, against literal full passes."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

import seqmodels
from experiments.analysis import requests
from experiments.analysis.requests import Requests
from experiments.data.text.tokenizers import Bytes

PREFIX = [10]
PAIRS = [
    ("The cat", " sat"),
    ("The cat ", "sat"),
    ("", "one"),
    ("a", "b"),
    ("A longer context, which is cut. " * 3, "end"),
]


@functools.cache
def model(**options):
    config = dict(
        kind="language_model",
        vocab_size=257,
        width=8,
        depth=2,
        pattern=("lru", "attention"),
        mixers={"lru": dict(state_size=4), "attention": dict(heads=2)},
        channel="none",
        tie_embeddings=False,
    )
    made = seqmodels.build_model(config | options, rngs=nnx.Rngs(0))
    # Tokens are told apart, and what is generated is ASCII.
    made.head.kernel[...] = 8 * made.head.kernel[...] * (np.arange(257)[None] < 128)
    return made


def made(**options):
    return Requests(model(), Bytes(), **dict(prefix=PREFIX, batch=3) | options)


def chances(tokens):
    """Log-probabilities of the token after each, (t, v), by one pass."""
    padded = np.zeros((1, 128), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(full(model(), padded))[0, : len(tokens)]


full = jax.jit(lambda model, tokens: jax.nn.log_softmax(model(tokens)[0], axis=-1))


def literal(tokens, known):
    rows = chances(tokens)[known - 1 : len(tokens) - 1]
    score = sum(row[token] for row, token in zip(rows, tokens[known:], strict=True))
    return score, all(row.argmax() == token for row, token in zip(rows, tokens[known:], strict=True))


@pytest.mark.slow
def test_log_likelihoods_of_continuations(monkeypatch):
    monkeypatch.setattr(requests, "CHUNK", 32)  # the longest context takes several calls
    answers = made().loglikelihood(PAIRS)
    assert len(answers) == len(PAIRS)
    for (context, continuation), (score, greedy) in zip(PAIRS, answers, strict=True):
        tokens = [*(context.encode() or PREFIX), *continuation.encode()]
        # Spaces at the end of a context belong to the continuation, so that the first two are the same.
        known = len(context.rstrip().encode()) or 1
        expected, likeliest = literal(tokens, known)
        assert score == pytest.approx(expected, rel=1e-4)
        assert greedy == likeliest
    assert answers[0] == answers[1]
    # Greedy continuations are recognised, and what only begins like one is not.
    greedy = made().generate_until([("The cat", dict(max_gen_toks=4))])[0]
    found = made().loglikelihood([("The cat", greedy), ("The cat", greedy[:-1] + "~"), ("The cat", "")])
    assert [likeliest for _, likeliest in found] == [True, False, True]
    assert found[2] == (0.0, True)


@pytest.mark.sample(3)
@pytest.mark.parametrize("limit", [None, 8, 20])
def test_log_likelihoods_of_texts(limit):
    texts = ["It rains, and it pours.", "Hi", "Exactly8", ""]
    answers = made(limit=limit).loglikelihood_rolling(texts)
    for text, score in zip(texts, answers, strict=True):
        tokens, expected, place = [*PREFIX, *text.encode()], 0.0, 1
        while place < len(tokens):
            stop = min(len(tokens), place + (limit or len(tokens)))
            # The model reads the last tokens before those that are predicted, as many as it can.
            window = tokens[max(0, stop - 1 - (limit or len(tokens))) : stop]
            expected += literal(window, len(window) - (stop - place))[0]
            place = stop
        assert score == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_contexts_lose_their_beginning():
    (context, continuation) = PAIRS[-1]
    (short,) = made(limit=12).loglikelihood([(context, continuation)])
    window = (context + continuation).encode()[-13:]
    assert short[0] == pytest.approx(literal(list(window), 9)[0], rel=1e-4)
    with pytest.raises(ValueError, match="a continuation has 13 tokens, and the model reads at most 12"):
        made(limit=12).loglikelihood([("a", "x" * 13)])
    with pytest.raises(ValueError, match="max_gen_toks=13, and the model reads at most 12 tokens"):
        made(limit=12).generate_until([("a", dict(max_gen_toks=13))])


@pytest.mark.slow
def test_continuations_end_before_a_stop():
    free = made().generate_until([("The cat", dict(max_gen_toks=40))])[0]
    stop, later = free[3:6], free[-3:]
    assert free.find(later) > free.find(stop)
    prompts = [("The cat", dict(max_gen_toks=40, until=[later, stop, ""])), ("A dog", dict(max_gen_toks=20))]
    prompts += [("The cat", dict(max_gen_toks=40, until=stop, do_sample=False, temperature=0.7))]
    ended, other, same = made().generate_until(prompts)
    assert ended == same == free[: free.find(stop)]
    alone = seqmodels.generate(model(), [list(b"A dog")], max_new_tokens=20, temperature=0, stop=[[256]])
    assert other == Bytes().decode(alone.tokens[0, : alone.lengths[0]])
    sampled = dict(max_gen_toks=40, temperature=5.0)
    assert made().generate_until([("The cat", sampled)])[0] != free
    with pytest.raises(
        ValueError, match="generation has the option 'num_beams'; expected until, max_gen_toks"
    ):
        made().generate_until([("a", dict(num_beams=3))])
    with pytest.raises(ValueError, match="top_k=0"):
        made().generate_until([("a", dict(do_sample=True, top_k=0))])


def test_limits_beyond_the_table_of_positions_and_bad_parameters():
    with pytest.raises(ValueError, match="max_length=9, but the model has max_positions=8"):
        table = model(absolute_positions="learned", max_positions=8)
        Requests(table, Bytes(), prefix=PREFIX, limit=9)
    broken = nnx.clone(model())
    broken.head.kernel[...] = broken.head.kernel[...] * np.nan
    with pytest.raises(FloatingPointError, match="the logits of a text of 2 tokens are not finite"):
        Requests(broken, Bytes(), prefix=PREFIX, batch=3).loglikelihood([("a", "b")])
