"""Generated tokens are those of full passes without a state, whatever the padding, the chunks and the blocks."""

import functools
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import seqmodels
from seqmodels import decoding, generation
from tests.test_project import ROOT

VOCAB = 13
MODEL = dict(kind="language_model", vocab_size=VOCAB, width=8, channel="none", tie_embeddings=False)
OPTIONS = {
    "mamba2": dict(state_size=4, head_dim=4),
    "attention": dict(heads=2),
    "gated_deltanet": dict(heads=2, key_dim=4, value_dim=4),
    "s5": dict(state_size=4),
    "hyena": dict(max_length=64),
}
SMALL = MODEL | dict(depth=1, pattern=("lru",), mixers={"lru": dict(state_size=4)})
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [8, 9], [7]]
PAIR = [[1, 2], [5]]


def made(config):
    model = seqmodels.build_model(config, rngs=nnx.Rngs(0))
    # Logits of an untrained model are nearly equal; these tell tokens apart.
    model.head.kernel[...] = 8 * model.head.kernel[...]
    return model


@functools.cache
def small():
    return made(SMALL)


@functools.cache
def full_pass():
    return jax.jit(lambda model, tokens: jax.nn.log_softmax(model(tokens)[0], axis=-1))


def check_against_full_passes(model, prompts, new, *, width, atol=1e-4):
    """Raises unless every new token is the most probable one of a full pass over its row."""
    for row, prompt in enumerate(prompts):
        given = [*prompt, *new.tokens[row]]
        padded = np.zeros((1, width), np.int32)
        padded[0, : len(given)] = given
        chances = np.asarray(full_pass()(model, padded))[0, len(prompt) - 1 : len(given) - 1]
        assert new.tokens[row].tolist() == chances.argmax(-1).tolist()
        np.testing.assert_allclose(new.log_probabilities[row], chances.max(-1), atol=atol)


@pytest.mark.parametrize(
    "pattern",
    [("mamba2", "attention"), pytest.param(("gated_deltanet", "hyena", "s5"), marks=pytest.mark.slow)],
)
def test_a_hybrid_generates_what_full_passes_predict(pattern):
    options = {name: OPTIONS[name] for name in pattern}
    model = made(MODEL | dict(depth=len(pattern), pattern=pattern, mixers=options))
    # Chunks of 4: three for the longest prompt; the others begin in the last one, or have nothing to read.
    new = seqmodels.generate(model, PROMPTS, max_new_tokens=6, temperature=0, chunk=4, block=4)
    assert new.lengths.tolist() == [6, 6, 6]
    assert len(np.unique(new.tokens)) > 2
    check_against_full_passes(model, PROMPTS, new, width=20)


def test_padding_on_the_left_enters_no_state():
    given = [np.asarray(prompt, np.int32) for prompt in PROMPTS]
    padded, _ = generation.prefill(small(), given, 6, 4)
    for row, prompt in enumerate(given):
        alone, _ = generation.prefill(small(), [prompt], 6, 4)
        for with_others, own in zip(jax.tree.leaves(padded), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(with_others[row], own[0], atol=1e-6)


def test_chunks_and_blocks_change_nothing():
    settings = dict(max_new_tokens=10, seed=4)
    wanted = seqmodels.generate(small(), PROMPTS, **settings, block=8)
    for sizes in (dict(chunk=1, block=8), dict(chunk=3, block=8)):
        found = seqmodels.generate(small(), PROMPTS, **settings, **sizes)
        assert found.tokens.tolist() == wanted.tokens.tolist()
        np.testing.assert_allclose(found.log_probabilities, wanted.log_probabilities, atol=1e-4)
    blocks = list(seqmodels.stream(small(), PROMPTS, **settings, block=8))
    assert [each.tokens.shape for each in blocks] == [(3, 8), (3, 2)]
    assert np.concatenate([each.tokens for each in blocks], axis=1).tolist() == wanted.tokens.tolist()


def test_a_row_depends_on_its_seed_and_place_alone():
    many = dict(max_new_tokens=24, block=8)
    both = seqmodels.generate(small(), [[1, 2], [1, 2]], **many)
    first = seqmodels.generate(small(), PAIR, **many)
    assert first.tokens[0].tolist() == both.tokens[0].tolist()
    assert both.tokens[0].tolist() != both.tokens[1].tolist()
    other = seqmodels.generate(small(), PAIR, **many, seed=1)
    assert first.tokens[0].tolist() != other.tokens[0].tolist()
    as_array = seqmodels.generate(small(), jnp.asarray([[1, 2], [1, 2]]), **many)
    assert as_array.tokens.tolist() == both.tokens.tolist()


def test_rows_end_with_a_stop_sequence_and_the_loop_with_the_last_row():
    settings = dict(max_new_tokens=24, block=8)
    free = seqmodels.generate(small(), PAIR, **settings)
    # The third and fourth new token of the first row, and the second of the other.
    stops = [free.tokens[0, 2:4].tolist(), free.tokens[1, 1:2].tolist(), [12] * 5]
    ended = seqmodels.generate(small(), PAIR, **settings, stop=stops)
    for row in range(2):
        length = ended.lengths[row]
        assert length == first_end(free.tokens[row].tolist(), stops)
        assert ended.tokens[row, :length].tolist() == free.tokens[row, :length].tolist()
        np.testing.assert_array_equal(ended.tokens[row, length:], 0)
        np.testing.assert_array_equal(ended.log_probabilities[row, length:], 0)
    assert ended.tokens.shape[1] == ended.lengths.max() < 24
    # Tokens of the prompt end nothing, together with the first new one.
    across = [[2, int(free.tokens[0, 0])], *stops[1:]]
    ended = seqmodels.generate(small(), PAIR, **settings, stop=across)
    assert ended.lengths[0] == first_end(free.tokens[0].tolist(), across) > 1


def first_end(tokens, stops):
    """The number of tokens up to the end of the first stop sequence."""
    for length in range(1, len(tokens) + 1):
        if any(tokens[:length][-len(stop) :] == stop for stop in stops):
            return length
    return len(tokens)


def test_a_repetition_penalty_counts_the_prompt_and_the_output():
    tokens = seqmodels.generate(
        small(), [list(range(5))], max_new_tokens=VOCAB - 5, temperature=0, repetition_penalty=1e9
    ).tokens[0]
    # Positive logits of seen tokens fall to zero and negative ones far below: new ones are positive first.
    call = jax.jit(lambda model, tokens: model(tokens)[0])
    logits = np.asarray(call(small(), jnp.asarray([[*range(5), *tokens.tolist()]])))[0]
    seen = set(range(5))
    for step, token in enumerate(tokens.tolist()):
        row = logits[4 + step]
        lowered = [(x / 1e9 if x > 0 else x * 1e9) if i in seen else x for i, x in enumerate(row)]
        assert token == int(np.argmax(lowered))
        seen.add(token)


@pytest.mark.parametrize(
    "tokens, options, message",
    [
        ([], {}, "tokens holds no sequence; expected at least one"),
        ([[1], []], {}, r"tokens\[1\] is empty"),
        ("text", {}, "tokens is 'text'; expected sequences of token ids"),
        ([1, 2], {}, r"tokens\[0\] is int64\[\]; expected integer token ids \(t,\)"),
        ([[0.5]], {}, r"tokens\[0\] is float64\[1\]"),
        ([[1], [3, 13]], {}, r"tokens\[1\]\[1\] is 13; expected 0 to 12, as vocab_size=13"),
        ([[1]], dict(max_new_tokens=0), "max_new_tokens=0; expected an integer of at least 1"),
        ([[1]], dict(chunk=0), "chunk=0"),
        ([[1]], dict(block=1.5), r"block=1\.5"),
        ([[1]], dict(seed=-1), "seed=-1; expected an integer from 0 to 4294967295"),
        ([[1]], dict(top_k=14), "top_k=14; expected an integer from 1 to 13"),
        ([[1]], dict(stop=[[]]), r"stop\[0\] is empty"),
        ([[1]], dict(stop=[[99]]), r"stop\[0\]\[0\] is 99"),
        ([[1]], dict(stop="x"), "stop is 'x'"),
    ],
)
def test_invalid_arguments_are_refused_before_anything_is_computed(tokens, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        seqmodels.stream(small(), tokens, **{"max_new_tokens": 2} | options)


def test_other_models_and_rows_beyond_the_table_of_positions_are_refused():
    with pytest.raises(TypeError, match="model is a Linear; expected a LanguageModel"):
        seqmodels.stream(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), [[1]], max_new_tokens=1)
    model = made(SMALL | dict(absolute_positions="learned", max_positions=8))
    with pytest.raises(
        ValueError, match="needs 9 positions, but max_positions=8; expected at most 6 new tokens"
    ):
        seqmodels.stream(model, [[1, 2, 3]], max_new_tokens=7)
    seqmodels.stream(model, [[1, 2, 3]], max_new_tokens=6)


def test_logits_that_are_not_finite_are_named():
    model = made(SMALL)
    model.head.kernel[...] = model.head.kernel[...] * np.nan
    with pytest.raises(FloatingPointError, match="the logits of row 0 are not finite at new token 0"):
        seqmodels.generate(model, PAIR, max_new_tokens=2, block=8)


HYBRIDS = runpy.run_path(str(ROOT / "configs" / "hybrids.py"))["MODELS"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["griffin", "jamba"])
def test_published_hybrids_generate_what_full_passes_predict(name):
    # One layer of each kind.
    kinds = tuple(dict.fromkeys(HYBRIDS[name]["pattern"]))
    small = MODEL | HYBRIDS[name] | dict(width=32, pattern=kinds, depth=len(kinds))
    model = made(small)
    new = seqmodels.generate(model, PROMPTS, max_new_tokens=4, temperature=0, chunk=16, block=4)
    check_against_full_passes(model, PROMPTS, new, width=16)


def test_a_model_on_a_device_compiles_each_loop_once():
    """Parameters that are put on a device, as those of checkpoints are, take part in what compiled programs depend on."""
    graph, variables = nnx.split(small())
    model = nnx.merge(graph, jax.device_put(variables, jax.devices()[1]))
    loop = decoding._compiled(decoding.options())
    before = generation._read._cache_size(), loop._cache_size()
    prompt = [list(range(1, 10))]  # two whole chunks of four tokens, and the one that the first step reads
    new = seqmodels.generate(
        model, prompt, max_new_tokens=6, block=2, chunk=4, stop=[[12, 12]], temperature=0
    )
    assert generation._read._cache_size() - before[0] == 1
    assert loop._cache_size() - before[1] == 1
    assert new.tokens.shape == (1, 6)


def test_options_of_a_gpu_are_passed_and_change_no_token(monkeypatch):
    """A compiler for CPUs takes them too, and names one that does not exist."""
    assert decoding.options() == ()
    arguments = dict(max_new_tokens=5, temperature=0)
    expected = generation.generate(small(), PAIR, **arguments)
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "options", lambda: decoding.GPU_OPTIONS)
        got = generation.generate(small(), PAIR, **arguments)
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_array_equal(got.log_probabilities, expected.log_probabilities)
    monkeypatch.setattr(decoding, "options", lambda: (("xla_gpu_no_such_option", "1"),))
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        generation.generate(small(), PAIR, **arguments)
    monkeypatch.undo()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert decoding.options() == decoding.GPU_OPTIONS
