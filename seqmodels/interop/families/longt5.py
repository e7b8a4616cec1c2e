"""LongT5: an encoder with local or transient global attention and T5's decoder, whose layers share one table of positions."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from seqmodels.config import EncoderDecoderConfig, StackConfig
from seqmodels.interop.families.llama import layer_of
from seqmodels.interop.family import Family, Pair, Pairs, linear, norm, same
from seqmodels.interop.options import Options

# Kinds of attention of the encoder: the names of theirs and of ours.
KINDS = {"local": "local", "transient-global": "transient_global"}
MODULES = {"local": "LocalSelfAttention", "transient_global": "TransientGlobalSelfAttention"}
# Projections between layers: their channel mixer and the channel mixer and activation of ours.
CHANNELS = {"relu": ("mlp", "relu"), "gated-gelu": ("geglu", None)}
MAPS = {"q": "query", "k": "key", "v": "value", "o": "output"}
# What follows from other options.
DERIVED = ("dense_act_fn", "is_gated_act", "dropout_rate", "initializer_factor", "is_encoder_decoder")
DERIVED += ("decoder_start_token_id", "n_positions", "output_past")
UNREAD = r"^(encoder|decoder)\.embed_tokens\.weight$|^lm_head\.weight$"


def read(options: Options) -> dict[str, Any]:
    """Returns our config."""
    options.ignore(*DERIVED)
    width, heads, size = options.take("d_model"), options.take("num_heads"), options.take("d_kv")
    if heads * size != width:
        options.refuse("d_kv", size, f"d_model / num_heads = {width // heads}")
    depth, kind = options.take("num_layers"), options.take("encoder_attention_type", "local")
    if kind not in KINDS:
        options.refuse("encoder_attention_type", kind, " or ".join(map(repr, KINDS)))
    projection = options.take("feed_forward_proj", "relu")
    if projection not in CHANNELS:
        options.refuse("feed_forward_proj", projection, " or ".join(map(repr, CHANNELS)))
    channel, activation = CHANNELS[projection]
    epsilon = options.take("layer_norm_epsilon", 1e-6)
    buckets = {
        "buckets": options.take("relative_attention_num_buckets", 32),
        "max_distance": options.take("relative_attention_max_distance", 128),
    }
    # Outputs of the decoder are scaled where embeddings were tied in the authors' code; the head is the table in any case.
    tied = options.take("tie_word_embeddings", True)
    scaled = options.take("scale_decoder_outputs", tied)
    common = {"heads": heads, "scale": 1.0}
    whole = (
        common
        | buckets
        | {
            "radius": options.take("local_radius", 127),
            "block": options.take("global_block_size", 16),
            "attention": KINDS[kind],
            "epsilon": epsilon,
        }
    )
    return {
        "kind": "encoder_decoder",
        "vocab_size": options.take("vocab_size"),
        "width": width,
        "depth": options.take("num_decoder_layers", None) or depth,
        "pattern": ("attention",),
        "mixers": {"attention": common | {"position": {"name": "t5", **buckets}}},
        "channel": channel,
        "channels": {channel: {"hidden": options.take("d_ff"), "activation": activation}},
        "norm": "rms_norm",
        "norm_options": {"epsilon": epsilon},
        "logit_scale": width**-0.5 if scaled else 1.0,
        "encoder": {"depth": depth, "pattern": ("longt5",), "mixers": {"longt5": whole}},
        "cross": common,
    }


def write(model: Any) -> dict[str, Any]:
    """Returns their options."""
    config, decoder = model.config, layer_of(model.decoder, 0)
    encoder = model.encoder.block(0).mixer.config
    names = {channel: theirs for theirs, (channel, _) in CHANNELS.items()}
    kinds = {ours: theirs for theirs, ours in KINDS.items()}
    return {
        "vocab_size": config.input.vocab_size,
        "d_model": config.stack.width,
        "d_kv": decoder.mixer.config.size,
        "d_ff": decoder.channel.up.kernel.shape[-1],
        "num_layers": config.encoder.depth,
        "num_decoder_layers": config.stack.depth,
        "num_heads": decoder.mixer.config.heads,
        "local_radius": encoder.radius,
        "global_block_size": encoder.block,
        "relative_attention_num_buckets": encoder.buckets,
        "relative_attention_max_distance": encoder.max_distance,
        "layer_norm_epsilon": decoder.mixer_norm.config.epsilon,
        "feed_forward_proj": names[config.stack.channel_of(0)[0]],
        "encoder_attention_type": kinds[encoder.attention],
        "tie_word_embeddings": True,
        "scale_decoder_outputs": config.logit_scale != 1,
    }


def shared(theirs: str, ours: Sequence[str]) -> Pair:
    """Returns the pair of a table that all layers of theirs read, and those of ours, which must be equal."""

    def save(*tables):
        if any(not np.array_equal(table, tables[0]) for table in tables):
            raise ValueError(
                f"{ours[0]} and those of later layers differ, and {theirs} is one for all; expected equal tables"
            )
        return (tables[0],)

    return Pair((theirs,), tuple(ours), lambda x: (x,) * len(ours), save)


def sides(config: EncoderDecoderConfig) -> Pairs:
    """Returns the pairs of all layers."""
    encoder, decoder = config.encoder, config.stack
    kind = dict(encoder.mixer_of(0)[1]).get("attention", "transient_global")
    found = [
        *_layers(encoder, "encoder.block", "encoder/blocks", {"mixer": MODULES[kind]}),
        *_layers(
            decoder,
            "decoder.block",
            "decoder/stack/blocks",
            {"mixer": "SelfAttention", "cross": "EncDecAttention"},
        ),
    ]
    first = f"encoder.block.0.layer.0.{MODULES[kind]}."
    tables = {
        f"{first}relative_attention_bias.weight": ("encoder/blocks", encoder, "mixer/near_bias"),
        f"{first}global_relative_attention_bias.weight": ("encoder/blocks", encoder, "mixer/far_bias"),
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (
            *("decoder/stack/blocks", decoder, "mixer/position/table"),
        ),
    }
    for theirs, (where, stack, ours) in tables.items():
        found.append(shared(theirs, [f"{where}/{layer}/{ours}" for layer in range(stack.depth)]))
    for layer in range(encoder.depth):
        name = f"encoder.block.{layer}.layer.0.{MODULES[kind]}.global_input_layer_norm.weight"
        found.append(same(name, f"encoder/blocks/{layer}/mixer/summary_scale"))
    return tuple(found)


def _layers(stack: StackConfig, theirs: str, ours: str, attentions: dict[str, str]) -> list[Pair]:
    """The pairs of the layers of one side: of its attentions in their order, and of the channel mixers behind them."""
    found: list[Pair] = []
    for layer in range(stack.depth):
        there, here = f"{theirs}.{layer}.layer", f"{ours}/{layer}"
        for number, (part, module) in enumerate(attentions.items()):
            for name, own in MAPS.items():
                found += linear(f"{there}.{number}.{module}.{name}", f"{here}/{part}/{own}")
            found += norm(f"{there}.{number}.layer_norm", f"{here}/{part}_norm")
        number = len(attentions)
        inside = {"wi_0": "gate", "wi_1": "up"} if stack.channel_of(layer)[0] == "geglu" else {"wi": "up"}
        for name, own in (inside | {"wo": "down"}).items():
            found += linear(f"{there}.{number}.DenseReluDense.{name}", f"{here}/channel/{own}")
        found += norm(f"{there}.{number}.layer_norm", f"{here}/channel_norm")
    return found


LONGT5 = Family(
    "LongT5ForConditionalGeneration",
    "longt5",
    read=read,
    write=write,
    outer=(
        same("shared.weight", "decoder/embedding/table"),
        *norm("encoder.final_layer_norm", "encoder_norm"),
        *norm("decoder.final_layer_norm", "decoder/norm"),
    ),
    layer="",
    parts=lambda _: {},
    sides=sides,
    unread=UNREAD,
    base="",
)
