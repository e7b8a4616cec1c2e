"""Zamba2: Mamba-2, with shared blocks of attention and a gated linear unit that some layers read, and adapters for each use."""

from typing import Any

from seqmodels.config import StackConfig
from seqmodels.interop.families.granite import halves
from seqmodels.interop.families.llama import layer_of, read_sizes, write_sizes
from seqmodels.interop.families.mamba2 import mixer
from seqmodels.interop.family import BLOCK, Family, Pair, Pairs, fused, linear, norm, same, transposed
from seqmodels.interop.options import THEIR_ACTIVATIONS, Options
from seqmodels.interop.rope import UNKNOWN_LENGTH, read_rope, write_rope

KINDS = {"mamba": "mamba2", "linear_attention": "mamba2", "hybrid": "hybrid"}
ATTENTION = ("mixer/query", "mixer/key", "mixer/value")
CHANNEL = ("channel/gate", "channel/up")
# Which code runs, initial values, and numbers that follow from others.
WITHOUT_EFFECT = (
    "attention_head_dim",
    "attention_hidden_size",
    "chunk_size",
    "ffn_hidden_size",
    "hybrid_layer_ids",
    "kv_channels",
    "mamba_headdim",
    "num_logits_to_keep",
    "num_query_groups",
    "rope_theta",
    "time_step_floor",
    "time_step_max",
    "use_long_context",
    "use_mamba_kernels",
    "use_mem_eff_path",
)


def read(options: Options) -> dict[str, Any]:
    """Returns our config."""
    options.ignore(*WITHOUT_EFFECT)
    options.only("time_step_limit", None)
    options.only("use_conv_bias", True)
    options.only("use_shared_mlp_adapter", True)
    sizes = read_sizes(options, tied=True)
    sizes["norm_options"]["epsilon"] = options.take("rms_norm_eps", 1e-5)
    bias = options.take("add_bias_linear", False)
    layers = _layers(options, sizes["depth"])
    return sizes | {
        "pattern": ("mamba2",),
        "mixers": {"mamba2": _read_mamba(options, sizes["width"], bias)},
        "channel": "none",
        "shared": _read_shared(options, sizes["width"], layers, bias),
    }


def _layers(options: Options, depth: int) -> tuple[int, ...]:
    """Returns the layers that read a shared block."""
    kinds = options.take("layer_types", None) or options.take("layers_block_type")
    options.ignore("layers_block_type")
    if len(kinds) != depth or not set(kinds) <= KINDS.keys():
        options.refuse(
            "layers_block_type", kinds, f"{' or '.join(KINDS)} for each of num_hidden_layers={depth}"
        )
    layers = tuple(layer for layer, kind in enumerate(kinds) if kind == "hybrid")
    if not layers:
        options.refuse("layers_block_type", kinds, "a hybrid layer")
    return layers


def _read_mamba(options: Options, width: int, bias: bool) -> dict[str, Any]:
    expand, heads = options.take("mamba_expand", 2), options.take("n_mamba_heads", 8)
    if expand * width % heads:
        options.refuse("n_mamba_heads", heads, f"a divisor of mamba_expand * hidden_size = {expand * width}")
    return {
        "state_size": options.take("mamba_d_state", 64),
        "expand": expand,
        "head_dim": expand * width // heads,
        "groups": options.take("mamba_ngroups", 1),
        "taps": options.take("mamba_d_conv", 4),
        "bias": bias,
        "dt_limit": (float(options.take("time_step_min", 0.001)), float("inf")),
        "epsilon": 1e-5,
    }


def _read_shared(options: Options, width: int, layers: tuple[int, ...], bias: bool) -> dict[str, Any]:
    heads, blocks = options.take("num_attention_heads", 32), options.take("num_mem_blocks", 1)
    if 2 * width % heads:
        options.refuse("num_attention_heads", heads, f"a divisor of 2 * hidden_size = {2 * width}")
    if not 1 <= blocks <= len(layers):
        options.refuse("num_mem_blocks", blocks, f"1 to {len(layers)}, the number of hybrid layers")
    size = 2 * width // heads
    rope = options.take("rope_parameters", None) or options.take("rope_scaling", None) or {}
    options.ignore("rope_scaling", "partial_rotary_factor")
    turned = options.flag("use_mem_rope", False)
    if turned and "dynamic" in rope.values():
        options.refuse("rope_type", "dynamic", "a kind that does not depend on the number of tokens")
    attention = {
        "heads": heads,
        "kv_heads": options.take("num_key_value_heads", None) or heads,
        "scale": (size / 2) ** -0.5,
        "position": read_rope(options) if turned else "none",
        "output_projection": False,
    }
    adapted = ATTENTION if options.flag("use_shared_attention_adapter", False) else ()
    channel = {
        "hidden": options.take("intermediate_size", None) or 4 * width,
        "activation": options.activation("hidden_act", "gelu"),
        "bias": bias,
    }
    return {
        "layers": layers,
        "blocks": blocks,
        "mixer": attention,
        "channel": channel,
        "adapters": (*adapted, "+".join(CHANNEL)),
        "rank": options.take("adapter_rank", 128),
    }


def write(model: Any) -> dict[str, Any]:
    """Returns their options."""
    stack, own = model.config.stack, layer_of(model, 0).mixer.config
    block, *_ = model.stack.shared  # none is a ValueError: the family does not express the model
    shared = stack.shared
    attention, channel = block.mixer.config, block.channel
    made = write_sizes(model) | {
        "layers_block_type": [
            "hybrid" if layer in shared.layers else "linear_attention" for layer in range(stack.depth)
        ],
        "mamba_d_state": own.state_size,
        "mamba_d_conv": own.taps,
        "mamba_expand": own.expand,
        "mamba_ngroups": own.groups,
        "n_mamba_heads": own.heads,
        "time_step_min": own.dt_limit[0],
        "add_bias_linear": own.bias,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.groups,
        "max_position_embeddings": getattr(attention.position, "length", None) or UNKNOWN_LENGTH,
        "intermediate_size": channel.up.kernel.shape[-1],
        "hidden_act": THEIR_ACTIVATIONS[channel.config.activation or "silu"],
        "num_mem_blocks": shared.blocks,
        "use_shared_attention_adapter": len(shared.adapters) > 1,
        "adapter_rank": shared.rank,
        "use_mem_rope": hasattr(attention.position, "base"),
    }
    return made | {"rope_parameters": write_rope(attention.position)} if made["use_mem_rope"] else made


def _pairs(stack: StackConfig) -> Pairs:
    """Returns the pairs of all layers and shared blocks; their tensors of a block are at the first layer that uses it."""
    found: list[Pair] = []
    shared = stack.shared
    for layer in range(stack.depth):
        theirs = f"model.layers.{layer}."
        inner = theirs + ("mamba_decoder." if layer in shared.layers else "")
        own = (*norm("input_layernorm", "mixer_norm"), *mixer("mamba"))
        found += (pair.within(inner, f"{BLOCK}/{layer}") for pair in own)
    for use, layer in enumerate(shared.layers):
        number = shared.block_of(layer)
        theirs, ours = f"model.layers.{shared.layers[number]}.shared_transformer.", f"{BLOCK}/{layer}/use"
        found += linear(f"model.layers.{layer}.linear", f"{ours}/output")
        if use == number:
            found += (pair.within(theirs, f"stack/shared/{number}") for pair in _block())
        for place, names in enumerate(shared.adapters):
            where = f"{theirs}{_adapter(names)}.{use}"
            found += (
                transposed(f"{where}.{factor}.weight", f"{ours}/adapters/{place}/{name}")
                for factor, name in enumerate("ab")
            )
    return tuple(found)


def _adapter(names: str) -> str:
    """Returns their name of the adapters of linear maps."""
    if names == "+".join(CHANNEL):
        return "feed_forward.gate_up_proj_adapter_list"
    return f"self_attn.linear_{names.removeprefix('mixer/')[0]}_adapter_list"


def _block() -> Pairs:
    """Returns the pairs within a shared block."""
    return (
        *norm("input_layernorm", "mixer_norm"),
        *linear("self_attn.q_proj", "mixer/query"),
        *linear("self_attn.k_proj", "mixer/key"),
        *linear("self_attn.v_proj", "mixer/value"),
        *linear("self_attn.o_proj", "projection"),
        *norm("pre_ff_layernorm", "channel_norm"),
        *fused("feed_forward.gate_up_proj", CHANNEL, halves),
        *linear("feed_forward.down_proj", "channel/down"),
    )


ZAMBA2 = Family(
    "Zamba2ForCausalLM",
    "zamba2",
    read=read,
    write=write,
    outer=(
        same("model.embed_tokens.weight", "embedding/table"),
        *norm("model.final_layernorm", "norm"),
        transposed("lm_head.weight", "head/kernel"),
    ),
    layer="model.layers.{}.",
    parts=lambda _: {},
    more=_pairs,
)
