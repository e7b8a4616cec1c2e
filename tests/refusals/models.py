"""Options of models that do not fit."""

from flax import nnx

from seqmodels import build_model

MODEL = dict(
    kind="language_model",
    vocab_size=9,
    width=8,
    depth=1,
    pattern=("attention",),
    mixer_defaults=dict(heads=2),
)


def model(**changes):
    values = {name: value for name, value in (MODEL | changes).items() if value is not ...}
    return lambda: nnx.eval_shape(lambda: build_model(values, rngs=nnx.Rngs(0)))


ROWS = [
    (
        model(base_width=4, mixer_defaults=dict(heads=1)),
        ValueError,
        "mixer_defaults.heads=1 at width=8 would be 0.5 at width=4",
    ),
    (
        model(base_width=4, mixer_defaults={}, pattern=("s5",)),
        ValueError,
        "is no matrix of a linear map, for which muP has rules; expected other mixers",
    ),
    (
        model(width=16, base_width=8, mixer_defaults={}, mixers=dict(attention=dict(position="none"))),
        ValueError,
        "2 features, 1 in the base; expected a number of heads that grows with the width",
    ),
    (
        model(base_width=4, kind="masked_language_model"),
        ValueError,
        "base_width=4 with kind='masked_language_model'; muP is for language_model, classifier, regressor",
    ),
    (model(kind="transformer"), ValueError, "kind='transformer'; expected one of"),
    (model(kind="languagemodel"), ValueError, "kind='languagemodel'; did you mean 'language_model'?"),
    (model(kind=...), ValueError, "kind=None; expected one of"),
    (model(num_layers=2), ValueError, "model has no field 'num_layers'"),
    (model(widht=2), ValueError, "did you mean 'width'?"),
    (model(width=...), ValueError, "model needs the option width"),
    (model(width=0), ValueError, "width=0; expected"),
    (model(depth=-1), ValueError, "depth=-1; expected"),
    (model(pattern=()), ValueError, "pattern=(); expected"),
    (model(pattern=("atention",)), ValueError, "unknown mixer 'atention'; did you mean 'attention'?"),
    (model(pattern=("attention+swiglue",)), ValueError, "did you mean 'swiglu'?"),
    (model(mixers={"atention": {}}), ValueError, "did you mean 'attention'?"),
    (model(mixers={"attention": dict(haeds=2)}), ValueError, "did you mean 'heads'?"),
    (
        model(channels={"mlp": {}}),
        ValueError,
        "channels has options for 'mlp', which the pattern does not use; it uses swiglu",
    ),
    (model(norm="rms"), ValueError, "unknown norm 'rms'"),
    (model(residual="paralell"), ValueError, "did you mean 'parallel'"),
    (model(norm_position="post_norm"), ValueError, "norm_position='post_norm'"),
    (model(remat="all"), ValueError, "remat='all'; expected"),
    (model(dropout=1.0), ValueError, "dropout=1.0; expected"),
    (model(dropout=-0.5), ValueError, "dropout=-0.5; expected"),
    (model(residual_scale=0.0), ValueError, "residual_scale=0.0; expected"),
    (model(shared={}), ValueError, "shared needs the option layers"),
    (model(shared=dict(layer=(0,))), ValueError, "did you mean 'layers'?"),
    (model(shared=dict(layers=(1, 0))), ValueError, "shared.layers=(1, 0); expected numbers of layers in"),
    (model(shared=dict(layers=(0, 9))), ValueError, "shared.layers=(0, 9); expected numbers below depth="),
    (model(shared=dict(layers=(0,), blocks=2)), ValueError, "shared.blocks=2 for 1 layers; expected at most"),
    (
        model(shared=dict(layers=(0,), adapters=("mixer/querry",))),
        ValueError,
        "'mixer/querry', which is no linear map of the block; it has channel/down",
    ),
    (
        model(shared=dict(layers=(0,), adapters=("mixer/query+channel/up",))),
        ValueError,
        "whose maps have [8, 16] inputs; expected one number",
    ),
    (
        model(shared=dict(layers=(0,), adapters=("mixer/query",), rank=17)),
        ValueError,
        "shared.rank=17 for mixer/query",
    ),
    (
        model(shared=dict(layers=(0,), channel=dict(channel="moe"))),
        ValueError,
        "shared.channel='moe' keep statistics or losses",
    ),
    (
        model(shared=dict(layers=(0,), mixer=dict(output_projection=False, head_dim=4))),
        ValueError,
        "output_projection=False with 8 heads of 4; expected the width 16",
    ),
    (model(dtype="float64"), ValueError, "dtype='float64'; "),
    (model(param_dtype="float16"), ValueError, "param_dtype='float16'; "),
    (model(vocab_size=...), ValueError, "set vocab_size for tokens or input_size for vectors"),
    (model(vocab_size=..., input_size=3), ValueError, "a language model needs vocab_size"),
    (model(input_size=3), ValueError, "vocab_size=9 and input_size=3"),
    (model(absolute_positions="learnt", max_positions=4), ValueError, "absolute_positions='learnt'"),
    (model(absolute_positions="learned"), ValueError, "learned positions need the size of their table"),
    (model(absolute_positions="learned", max_positions=0), ValueError, "max_positions=0; expected"),
    (model(mixer_defaults=dict(heads=2, causal=False)), ValueError, "layer 0 (attention) is not causal"),
    (model(pattern=("fnet",)), ValueError, "layer 0 (fnet) is not causal; a language model must be"),
    (model(kind="classifier"), ValueError, "model needs the option num_classes"),
    (model(kind="classifier", num_classes=1), ValueError, "num_classes=1; expected"),
    (model(kind="classifier", num_classes=2, pooling="max"), ValueError, "pooling='max'; expected"),
    (
        model(residual="reversible", channel="none"),
        ValueError,
        "'reversible' needs a channel mixer in every block",
    ),
    (
        model(residual="reversible", norm_position="post"),
        ValueError,
        "with residual='reversible'; expected 'pre'",
    ),
    (
        model(residual="reversible", remat="full"),
        ValueError,
        "remat='full' with residual='reversible'; expected 'none'",
    ),
    (model(residual="reversible", norm="batch_norm"), ValueError, "layer 0 keeps channel_norm.mean"),
    (
        model(
            residual="reversible", pattern=("rwkv7",), mixers={"rwkv7": dict(head_dim=4, value_residual=True)}
        ),
        ValueError,
        "layers read more than the streams",
    ),
    (
        model(kind="encoder_decoder", reading="prefix", cross=dict(heads=2)),
        ValueError,
        "reading='prefix', which has no cross-attention; leave it out",
    ),
    (model(kind="encoder_decoder", residual="parallel"), ValueError, "need residual='separate'"),
    (model(kind="encoder_decoder", encoder=dict(dept=1)), ValueError, "did you mean 'depth'?"),
    (model(kind="encoder_decoder", encoder=dict(width=4)), ValueError, "encoder.width=4; expected that of"),
    (model(kind="encoder_decoder", cross=dict(mixer="gla")), ValueError, "cross.mixer='gla' reads no source"),
    (
        model(kind="pointer_network", pattern=("fnet",)),
        ValueError,
        "the decoder of a pointer network must be",
    ),
    (model(hashes=4), ValueError, "tie_embeddings=True with hashes=4, which have no row per token"),
    (model(kind="masked_language_model", hashes=4), ValueError, "tie_embeddings=True with hashes=4"),
    (model(hashes=4, embedding_stddev=0.1), ValueError, "hashes=4 with vocab_size="),
    (
        model(hashes=3, tie_embeddings=False),
        ValueError,
        "hashes=3 of width=8; expected a divisor of the width",
    ),
    (model(kind="classifier", num_classes=2, molecules=1), ValueError, "molecules=1; expected at least 2"),
    (
        model(kind="classifier", num_classes=2, characters=dict(depth=2)),
        ValueError,
        "has no effect without molecules",
    ),
    (
        model(kind="classifier", num_classes=2, molecules=2, characters=dict(width=4)),
        ValueError,
        "characters.width=4; expected that of the other stack, 8",
    ),
    (model(kind="recurrent_memory", channel="moe"), ValueError, "would add that of the last segment alone"),
    (model(kind="recurrent_memory", segment=0), ValueError, "segment=0; expected at least 1"),
    (model(kind="pointer_network", encoder=dict(width=4)), ValueError, "encoder.width=4; expected that of"),
    (model(kind="autoencoder", pooling="first"), ValueError, "pooling='first'; expected"),
    (model(kind="regressor"), ValueError, "model needs the option output_size"),
    (model(kind="regressor", output_size=0), ValueError, "output_size=0; expected"),
    (
        model(kind="regressor", output_size=1, pattern=("fnet",), mixer_defaults={}),
        ValueError,
        "layer 0 (fnet) is not causal; a regressor with causal=True must be",
    ),
    (model(kind="masked_language_model", transform="gelo"), ValueError, "did you mean 'gelu'?"),
    (
        model(kind="masked_language_model", vocab_size=..., input_size=3),
        ValueError,
        "a masked language model needs vocab_size",
    ),
    (model(first_position=2), ValueError, "first_position=2 with max_positions=None"),
    (
        model(absolute_positions="learned", max_positions=2, first_position=2),
        ValueError,
        "first_position=2 with max_positions=2",
    ),
    (model(route=(1, 1)), ValueError, "route=(1, 1); expected two layers in order"),
    (
        model(route=(0, 2)),
        ValueError,
        "route=(0, 2); expected two layers in order, the second at most depth=1",
    ),
    (model(route=(0, 1), route_rate=1.0), ValueError, "route_rate=1.0; expected"),
    (model(token_types=0), ValueError, "token_types=0; expected"),
    (model(route_rate=0.3), ValueError, "route_rate=0.3 has no effect without route"),
    (
        model(embedding_norm_place="sum"),
        ValueError,
        "embedding_norm_place='sum' has no effect without a norm",
    ),
    (model(embedding_norm_place="end"), ValueError, "embedding_norm_place='end'; expected"),
    (
        model(kind="classifier", num_classes=2, vocab_size=..., input_size=3, token_types=2),
        ValueError,
        "are for tokens; vectors (input_size) have none",
    ),
    (model(width=True), TypeError, "width=True; expected an integer"),
    (model(depth=1.0), TypeError, "depth=1.0; expected an integer"),
    (model(scan="no"), TypeError, "scan='no'; expected True or False"),
    (model(dtype="bf16"), ValueError, "dtype='bf16'; expected"),
    (model(param_dtype="bf16"), ValueError, "param_dtype='bf16'; expected"),
    (model(vocab_size=-3), ValueError, "vocab_size=-3; expected"),
    (model(embedding_stddev=-1.0), ValueError, "embedding_stddev=-1.0; expected"),
    (model(mixer_defaults=dict(haeds=2)), ValueError, "mixer_defaults has 'haeds'; did you mean 'heads'?"),
    (model(mixers={"attention": 3}), TypeError, "mixers={'attention': 3}; expected"),
    (model(pattern="attention"), TypeError, "pattern='attention'; expected"),
    (model(pattern=("attention+",)), ValueError, "pattern has 'attention+'; expected MIXER, MIXER+CHANNEL"),
    (model(pattern=("+swiglu",)), ValueError, "pattern has '+swiglu'; expected MIXER, MIXER+CHANNEL"),
    (model(norm="batch_norm"), ValueError, "batch_norm"),
]
