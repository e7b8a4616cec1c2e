"""LFM2: gated short convolutions and rotary attention with norms of queries and keys, each followed by a gated linear unit."""

from typing import Any

from seqmodels.interop.families.llama import (
    layer_of,
    mixers_of,
    read_heads,
    shortest,
    write_heads,
)
from seqmodels.interop.family import Family, convolution, linear, norm, same, transposed
from seqmodels.interop.options import Options
from seqmodels.interop.rope import read_rope, write_rope

KINDS = {"conv": "gated_short_conv", "full_attention": "attention"}
# Names of an earlier format for numbers that others state, and initial values.
WITHOUT_EFFECT = (
    "block_dim",
    "block_mlp_init_scale",
    "block_norm_eps",
    "block_out_init_scale",
    "block_use_xavier_init",
    "conv_dim",
    "conv_dim_out",
    "conv_use_xavier_init",
    "num_heads",
    "theta",
    "use_pos_enc",
)
PARTS = {
    "": (*norm("operator_norm", "mixer_norm"), *norm("ffn_norm", "channel_norm")),
    "gated_short_conv": (
        *linear("conv.in_proj", "mixer/input"),
        *convolution("conv.conv", "mixer/convolution"),
        *linear("conv.out_proj", "mixer/output"),
    ),
    "attention": (
        *linear("self_attn.q_proj", "mixer/query"),
        *linear("self_attn.k_proj", "mixer/key"),
        *linear("self_attn.v_proj", "mixer/value"),
        *linear("self_attn.out_proj", "mixer/output"),
        *norm("self_attn.q_layernorm", "mixer/query_norm"),
        *norm("self_attn.k_layernorm", "mixer/key_norm"),
    ),
    "swiglu": (
        *linear("feed_forward.w1", "channel/gate"),
        *linear("feed_forward.w3", "channel/up"),
        *linear("feed_forward.w2", "channel/down"),
    ),
}


def read(options: Options) -> dict[str, Any]:
    """Returns our config."""
    options.ignore(*WITHOUT_EFFECT)
    options.only("block_use_swiglu", True)
    depth, epsilon = options.take("num_hidden_layers"), options.take("norm_eps", 1e-5)
    heads = read_heads(options) | {
        "position": read_rope(options, base=1_000_000.0),
        "qk_norm": True,
        "norm_epsilon": epsilon,
    }
    taps = {"taps": options.take("conv_L_cache", 3), "bias": options.take("conv_bias", False)}
    places = options.take("full_attn_idxs", None)
    kinds = options.take("layer_types", None) or [
        "full_attention" if places is None or layer in places else "conv" for layer in range(depth)
    ]
    if len(kinds) != depth or not set(kinds) <= KINDS.keys():
        options.refuse("layer_types", kinds, f"{' or '.join(KINDS)} for each of num_hidden_layers={depth}")
    pattern, mixers = (
        shortest([KINDS[kind] for kind in kinds]),
        {"gated_short_conv": taps, "attention": heads},
    )
    return {
        "vocab_size": options.take("vocab_size"),
        "width": options.take("hidden_size"),
        "depth": depth,
        "pattern": pattern,
        "mixers": {name: mixers[name] for name in pattern},
        "channel": "swiglu",
        "channels": {"swiglu": {"hidden": _hidden(options)}},
        "norm": "rms_norm",
        "norm_options": {"epsilon": epsilon},
        "tie_embeddings": options.take("tie_embedding", options.take("tie_word_embeddings", True)),
    }


def _hidden(options: Options) -> int:
    """Returns the inner width, which they compute from an option unless told otherwise."""
    hidden = options.take("block_ff_dim", options.take("intermediate_size", None))
    if hidden is None:
        options.take("intermediate_size")
    factor = options.take("block_ffn_dim_multiplier", 1.0)
    multiple = options.take("block_multiple_of", 256)
    if not options.flag("block_auto_adjust_ff_dim", True):
        return hidden
    hidden = int(2 * hidden / 3)
    return hidden if factor is None else -(-int(factor * hidden) // multiple) * multiple


def write(model: Any) -> dict[str, Any]:
    """Returns their options."""
    config, (names, mixers) = model.config, mixers_of(model)
    conv, attention = mixers["gated_short_conv"].config, mixers["attention"]
    heads = {name: value for name, value in write_heads(attention).items() if name != "head_dim"}
    kinds = {ours: theirs for theirs, ours in KINDS.items()}
    return heads | {
        "vocab_size": config.input.vocab_size,
        "hidden_size": config.stack.width,
        "num_hidden_layers": config.stack.depth,
        "layer_types": [kinds[name] for name in names],
        "norm_eps": model.norm.config.epsilon,
        "intermediate_size": layer_of(model, 0).channel.up.kernel.shape[-1],
        "block_auto_adjust_ff_dim": False,
        "rope_parameters": write_rope(attention.config.position),
        "conv_L_cache": conv.taps,
        "conv_bias": conv.bias,
        "tie_word_embeddings": config.tie_embeddings,
    }


LFM2 = Family(
    "Lfm2ForCausalLM",
    "lfm2",
    read=read,
    write=write,
    outer=(
        same("model.embed_tokens.weight", "embedding/table"),
        *norm("model.embedding_norm", "norm"),
        transposed("lm_head.weight", "head/kernel"),
    ),
    layer="model.layers.{}.",
    parts=lambda _: PARTS,
)
