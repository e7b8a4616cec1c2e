"""Decoding with drafts gives the tokens of decoding without, in fewer calls where the text repeats itself."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import seqmodels
from seqmodels.generation import SLOTS
from seqmodels.speculative import look_up
from tests.layers.mixers.table import MIXERS
from tests.seqmodels.test_generation import MODEL, OPTIONS, SMALL, made, small

# Of different lengths; the second repeats itself from the start.
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [8, 9] * 4, [7]]
LONG = dict(max_new_tokens=40, block=32)
PATTERNS = [
    ("mamba2", "attention"),
    *(
        pytest.param(pattern, marks=pytest.mark.slow)
        for pattern in [
            ("attention",),
            ("mamba2",),
            ("gated_deltanet", "hyena", "s5"),
            ("window",),
            ("rwkv7", "mega", "mla"),
        ]
    ),
]
# Options of mixers that `tests.seqmodels.test_generation` has not.
MORE = {"window": dict(mixer="attention", heads=2, window=4)} | {
    name: MIXERS[name][1] for name in ("rwkv7", "mega", "mla")
}


@functools.cache
def model_of(pattern):
    options = OPTIONS | MORE
    return made(
        MODEL | dict(depth=len(pattern), pattern=pattern, mixers={name: options[name] for name in pattern})
    )


def check_same(model, prompts, settings, **draft):
    """Generates without and with drafts, and returns both after comparing them."""
    plain = seqmodels.generate(model, prompts, **settings)
    found = seqmodels.generate(model, prompts, **settings, **draft)
    np.testing.assert_array_equal(found.lengths, plain.lengths)
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    np.testing.assert_allclose(found.log_probabilities, plain.log_probabilities, atol=1e-4)
    return plain, found


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_tokens_are_those_without_drafts(pattern):
    model = model_of(pattern)
    # At the low temperature rows fall into cycles, so that drafts are right; at the high one they are wrong.
    sharp = dict(LONG, temperature=0.02, repetition_penalty=1.01, stop=[[1, 2, 3, 4, 5], [12] * 5])
    plain, found = check_same(model, PROMPTS, sharp, lookup=4, ngram=2)
    assert plain.calls == plain.lengths.max()
    assert found.calls < 0.8 * plain.calls
    _, random = check_same(model, PROMPTS, sharp | dict(temperature=2.0), lookup=4, ngram=2)
    assert random.calls <= 1.4 * random.lengths.max()
    # A row is stopped by the same token, and others go on.
    stops = [plain.tokens[1, 20:22].tolist(), [12] * 5]
    _, ended = check_same(model, PROMPTS, sharp | dict(stop=stops), lookup=4, ngram=2)
    assert ended.lengths.min() < 40


@pytest.mark.slow
def test_greedy_tokens_to_the_last_slot_of_the_cache():
    model = model_of(("mamba2", "attention"))
    new = SLOTS + 1 - len(PROMPTS[0])
    settings = dict(max_new_tokens=new, block=new, temperature=0)
    _, found = check_same(model, PROMPTS, settings, lookup=7, ngram=1)
    assert found.lengths.tolist() == [new] * 3


@pytest.mark.slow
def test_a_table_of_positions_may_be_full():
    model = made(SMALL | dict(absolute_positions="learned", max_positions=20))
    check_same(model, [[1, 2, 1, 2, 1], [3]], dict(max_new_tokens=16, temperature=0), lookup=4, ngram=2)


def test_drafts_are_what_followed_the_last_tokens():
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 4, (20, 24), np.int32)
    lengths = rng.integers(1, 25, 20)
    for ngram in (1, 2, 3):
        draft, found = look_up(jnp.asarray(rows), jnp.asarray(lengths), most=6, ngram=ngram)
        for row, length, got, has in zip(rows.tolist(), lengths.tolist(), draft, found, strict=True):
            row, wanted = row[:length], None
            for end in range(ngram, length):
                if row[end - ngram : end] == row[length - ngram :]:
                    wanted = (row[end:] * 6)[:6]
            assert bool(has) == (wanted is not None)
            if wanted:
                assert got.tolist() == wanted
        assert found.any()
    assert not found.all()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(lookup=0), "lookup=0; expected an integer of at least 1"),
        (dict(lookup=2.5), r"lookup=2\.5; expected an integer"),
        (dict(lookup=4, ngram=0), "ngram=0; expected an integer of at least 1"),
        (dict(ngram=2), "ngram=2 has no effect without lookup"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        seqmodels.stream(small(), [[1]], max_new_tokens=2, **options)
