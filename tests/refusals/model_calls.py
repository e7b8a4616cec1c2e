"""Calls of models, of what generates with them, and of layers that reduce tokens, with wrong arguments."""

import numpy as np
from flax import nnx

from experiments.analysis.scale import scales
from layers.reduction import CharacterConfig, DeletionGateConfig, HashEmbeddingConfig, remaining
from seqmodels import (
    DecimateConfig,
    LazyLLMConfig,
    LengthenConfig,
    build_model,
    decimate,
    generate_from,
    lazy_read,
    lazy_state,
    lengthen,
)
from tests.refusals.mixers import ones, small, traced
from tests.refusals.models import MODEL, model

SOURCED = MODEL | dict(kind="encoder_decoder", absolute_positions="learned", max_positions=4)
ENCODER = MODEL | dict(kind="masked_language_model", token_types=2)
TOKENS = np.zeros((1, 3), np.int32)


def wrote(sources=((1,),), **options):
    """Generation from sources by a model without arrays, which is never run."""
    made = nnx.eval_shape(lambda: build_model(SOURCED, rngs=nnx.Rngs(0)))
    return generate_from(made, sources, **dict(start=0, max_new_tokens=1) | options)


def decimated(layers=(0,), **options):
    def call():
        fields = dict(mixer_defaults={}, pattern=("mamba+none",), mixers=dict(mamba=dict(state_size=2)))
        made = nnx.eval_shape(lambda: build_model(MODEL | fields | options, rngs=nnx.Rngs(0)))
        return decimate(made, TOKENS, DecimateConfig(layers=layers, length=8))

    return call


def lazily(shape=(1, 3), config=None, **options):
    """A call after a state for one row of four tokens."""

    def call():
        made = nnx.eval_shape(lambda: build_model(MODEL | options, rngs=nnx.Rngs(0)))
        state = lazy_state(made, 1, 4)
        return lazy_read(made, np.zeros(shape, np.int32), state, config or LazyLLMConfig((0,), (0.5,)))

    return call


def remembered(tokens, carried=False, **keywords):
    """A call of a model with a memory between segments of two tokens."""
    made = build_model(MODEL | dict(kind="recurrent_memory", segment=2), rngs=nnx.Rngs(0))
    return made(tokens, made.init_state(1) if carried else None, **keywords)[0]


def crossing():
    """A mixer of width 8 that reads sources."""
    return small("attention", heads=2, position="none")


def encoded(*inputs, token_types=2, **keywords):
    def call():
        made = build_model(ENCODER | dict(token_types=token_types), rngs=nnx.Rngs(0))
        return made(TOKENS, *inputs, **keywords)[0]

    return call


def lengthened(tokens, **options):
    def call():
        made = build_model(MODEL | dict(mixer_defaults={}) | options, rngs=nnx.Rngs(0))
        return lengthen(made, tokens, LengthenConfig(length=8))

    return call


ROWS = [
    (
        lambda: generate_from(model()(), [[1]], start=0, max_new_tokens=1),
        TypeError,
        "model is a LanguageModel; expected an EncoderDecoder",
    ),
    (
        lambda: scales(MODEL | dict(shared=dict(layers=(0,))), batch=1, length=2, seed=0),
        ValueError,
        "shared.layers=(0,) read shared blocks, which scales by layer leave out",
    ),
    (lambda: HashEmbeddingConfig(8, hashes=3), ValueError, "hashes=3 of width=8; expected a divisor"),
    (lambda: HashEmbeddingConfig(8, buckets=0), ValueError, "buckets=0; expected at least 1"),
    (lambda: CharacterConfig(8, rate=1), ValueError, "rate=1; expected at least 2"),
    (lambda: CharacterConfig(8, activation="gelo"), ValueError, "did you mean 'gelu'?"),
    (lambda: DeletionGateConfig(8, strength=0.0), ValueError, "strength=0.0; expected"),
    (traced(lambda: remaining(ones(1, 4) == 1, 0).places), ValueError, "size=0; expected at least 1"),
    (lambda: wrote(start=9), ValueError, "start=9; expected an integer from 0 to 8, as vocab_size=9"),
    (lambda: wrote(start=1.5), ValueError, "start=1.5; expected an integer"),
    (lambda: wrote(seed=-1), ValueError, "seed=-1; expected an integer from 0"),
    (lambda: wrote(max_new_tokens=0), ValueError, "max_new_tokens=0; expected an integer of at least 1"),
    (lambda: wrote(sources=[]), ValueError, "sources holds no sequence; expected at least one"),
    (lambda: wrote(sources=[[]]), ValueError, "sources[0] is empty"),
    (
        lambda: wrote(sources=[[1] * 5]),
        ValueError,
        "5 tokens of a source or target, but the table of positions",
    ),
    (
        traced(
            lambda: build_model(SOURCED, rngs=nnx.Rngs(0))(
                ones(2, 3, dtype="int32"), ones(1, 3, dtype="int32")
            )[0]
        ),
        ValueError,
        "source has 2 rows, and target has 1; expected one source per target",
    ),
    (
        traced(lambda: build_model(SOURCED, rngs=nnx.Rngs(0)).decoder(ones(2, 3, dtype="int32"))[0]),
        ValueError,
        "was called without a source; expected the output of an encoder",
    ),
    (
        traced(
            lambda: build_model(MODEL | dict(kind="pointer_network"), rngs=nnx.Rngs(0))(
                ones(2, 3, dtype="int32"), ones(1, 3, dtype="int32")
            )[0]
        ),
        ValueError,
        "source has 2 rows, and target has 1; expected one source per target",
    ),
    (
        lambda: build_model(MODEL | dict(kind="pointer_network"), rngs=nnx.Rngs(0))(
            ones(1, 2, dtype="int32"), 3 * ones(1, 1, dtype="int32")
        ),
        ValueError,
        "target[0, 0] is 3; expected 0 to 2, as the items and the end=3",
    ),
    (
        decimated(pattern=("mamba",)),
        ValueError,
        "model has layers of mamba; expected mamba+none in every one",
    ),
    (decimated(norm_position="post"), ValueError, "has other residuals, norms or positions than Mamba"),
    (decimated(layers=(5,)), ValueError, "layers=(5,); expected numbers below depth="),
    (
        lambda: LazyLLMConfig((1, 0), (0.5, 0.5)),
        ValueError,
        "layers=(1, 0); expected one or more layers in order",
    ),
    (lambda: LazyLLMConfig((0, 1), (0.5,)), ValueError, "keep=(0.5,); expected one part per layer"),
    (lambda: LazyLLMConfig((0, 1), (0.5, 0.7)), ValueError, "none above the one before"),
    (lazily(shape=(2, 3)), ValueError, "tokens [2, 3] after 0 in a state of 1 rows"),
    (lazily(shape=(1, 5)), ValueError, "at most 4 tokens"),
    (lazily(config=LazyLLMConfig((7,), (0.5,))), ValueError, "layers=(7,); expected numbers below depth="),
    (
        lazily(absolute_positions="learned", max_positions=4),
        ValueError,
        "absolute_positions='learned' of the model",
    ),
    (lazily(residual="reversible"), ValueError, "residual='reversible'"),
    (decimated(layers=(1, 0)), ValueError, "layers=(1, 0); expected one or more layers in order"),
    (
        traced(lambda: remembered(ones(1, 3, dtype="int32"), segment_ids=ones(1, 3, dtype="int32"))),
        ValueError,
        "expected one text per row, as Segments.of(ids, packed=False) says",
    ),
    (
        traced(lambda: remembered(ones(1, 3, dtype="int32"), True)),
        ValueError,
        "3 tokens with a state; a memory is carried between whole segments, expected a multiple of segment=2",
    ),
    (
        lambda: scales(MODEL | dict(kind="encoder_decoder"), batch=1, length=2, seed=0),
        ValueError,
        "kind='encoder_decoder' has two stacks",
    ),
    (traced(lambda: small().source(ones(1, 2, 8))), ValueError, "GLA reads no source"),
    (
        traced(lambda: small("attention", heads=2).source(ones(1, 2, 8))),
        ValueError,
        "expected position='none' and window=None",
    ),
    (
        traced(lambda: crossing().cross(ones(2, 2, 8), crossing().source(ones(1, 3, 8)))),
        ValueError,
        "has 1 rows, and x has 2; expected one source per row",
    ),
    (
        lengthened(TOKENS, mixer_defaults=dict(heads=2)),
        ValueError,
        "model has layers of attention; expected some of mamba2",
    ),
    (
        lengthened(TOKENS[0], pattern=("mamba2",), mixers=dict(mamba2=dict(head_dim=4))),
        ValueError,
        "tokens [3]; expected one or more rows (n, t)",
    ),
    (
        lengthened(TOKENS + 99, pattern=("mamba2",), mixers=dict(mamba2=dict(head_dim=4))),
        ValueError,
        "tokens[0, 0] is 99; expected 0 to",
    ),
    (lambda: LengthenConfig(length=0), ValueError, "length=0; expected"),
    (lambda: LengthenConfig(length=8, decay=1.0), ValueError, "decay=1.0; expected"),
    (traced(encoded(3)), ValueError, "a masked language model takes no state"),
    (encoded(types=TOKENS + 2), ValueError, "expected 0 to 1, as token_types=2"),
    (
        encoded(types=TOKENS[:, :1]),
        ValueError,
        "types are int32[1, 1]; expected integers [1, 3], one per token",
    ),
    (encoded(types=TOKENS + 0.5), ValueError, "types are float32[1, 3]; expected integers [1, 3]"),
    (traced(encoded(types=TOKENS, token_types=None)), ValueError, "expected token_types in its config"),
]
