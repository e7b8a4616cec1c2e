"""Granite, and its hybrid of Mamba-2, attention and experts: embeddings, branches, attention and logits have factors."""

from typing import Any

import numpy as np

from seqmodels.interop.families.llama import (
    ATTENTION,
    GLU,
    NORMS,
    OUTER,
    layer_of,
    mixers_of,
    read_heads,
    read_sizes,
    shortest,
    write_heads,
    write_sizes,
)
from seqmodels.interop.families.mamba2 import mixer, read_inner, write_inner
from seqmodels.interop.family import Family, Pair, Pairs, fused, linear, transposed
from seqmodels.interop.options import THEIR_ACTIVATIONS, Options
from seqmodels.interop.rope import read_rope, write_rope

KINDS = {
    "linear_attention": "mamba2",
    "mamba": "mamba2",
    "full_attention": "attention",
    "attention": "attention",
}


def read_scaled(options: Options) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the fields of a decoder and the options of its attention, with their factors."""
    sizes = read_sizes(options) | {
        "embedding_scale": float(options.take("embedding_multiplier", 1.0)),
        "branch_scale": float(options.take("residual_multiplier", 1.0)),
        "logit_scale": 1 / options.take("logits_scaling", 1.0),
    }
    attention = read_heads(options) | {
        "scale": float(options.take("attention_multiplier", 1.0)),
        "bias": options.take("attention_bias", False),
    }
    return sizes, attention


def write_scaled(model: Any, attention: Any) -> dict[str, Any]:
    """Returns the options that `read_scaled` reads."""
    config = model.config
    return (
        write_sizes(model)
        | write_heads(attention)
        | {
            "embedding_multiplier": config.input.embedding_scale,
            "residual_multiplier": config.stack.branch_scale,
            "logits_scaling": 1 / config.logit_scale,
            "attention_multiplier": attention.config.scale,
            "attention_bias": attention.config.bias,
        }
    )


def read(options: Options) -> dict[str, Any]:
    """Returns our config of Granite."""
    sizes, attention = read_scaled(options)
    attention["position"] = read_rope(options)
    channel = {
        "hidden": options.take("intermediate_size"),
        "activation": options.activation("hidden_act", "silu"),
        "bias": options.take("mlp_bias", False),
    }
    return sizes | {
        "pattern": ("attention",),
        "mixers": {"attention": attention},
        "channel": "swiglu",
        "channels": {"swiglu": channel},
    }


def write(model: Any) -> dict[str, Any]:
    """Returns their options of Granite."""
    block = layer_of(model, 0)
    return write_scaled(model, block.mixer) | {
        "rope_parameters": write_rope(block.mixer.config.position),
        "intermediate_size": block.channel.up.kernel.shape[-1],
        "hidden_act": THEIR_ACTIVATIONS[block.channel.config.activation or "silu"],
        "mlp_bias": block.channel.config.bias,
    }


def read_hybrid(options: Options) -> dict[str, Any]:
    """Returns our config of the hybrid."""
    options.only("hidden_act", "silu")
    options.ignore("logits_to_keep", "normalization_function")
    sizes, attention = read_scaled(options)
    kind = options.take("position_embedding_type", None)
    if kind not in (None, "nope", "rope"):
        options.refuse("position_embedding_type", kind, "None or 'rope'")
    rope = read_rope(options)
    attention["position"] = rope if kind == "rope" else "none"
    given = options.take("layers_block_type", None) or options.take("layer_types", None)
    kinds = given or ["linear_attention"] * sizes["depth"]
    for each in kinds:
        if each not in KINDS:
            options.refuse("layer_types", each, " or ".join(KINDS))
    if len(kinds) != sizes["depth"]:
        options.refuse("layer_types", kinds, f"one for each of num_hidden_layers={sizes['depth']}")
    pattern = shortest([KINDS[each] for each in kinds])
    inner = read_inner(options, sizes["norm_options"]["epsilon"], used="mamba2" in pattern)
    mixers = {"attention": attention, "mamba2": inner}
    hidden, shared = options.take("intermediate_size"), options.take("shared_intermediate_size", 1024)
    experts, top_k = options.take("num_local_experts", 8), options.take("num_experts_per_tok", 2)
    if experts and shared % hidden:
        options.refuse("shared_intermediate_size", shared, f"a multiple of intermediate_size={hidden}")
    channels = {"moe": {"experts": experts, "top_k": top_k, "hidden": hidden, "shared": shared // hidden}}
    if not experts:
        channels = {"swiglu": {"hidden": shared}}
    return sizes | {
        "pattern": pattern,
        "mixers": {name: mixers[name] for name in pattern},
        "channel": next(iter(channels)),
        "channels": channels,
    }


def write_hybrid(model: Any) -> dict[str, Any]:
    """Returns their options of the hybrid."""
    stack = model.config.stack
    names, mixers = mixers_of(model)
    attention = mixers["attention"]
    kinds = {"attention": "full_attention", "mamba2": "linear_attention"}
    rotates = hasattr(attention.config.position, "base")
    made = {
        "layer_types": [kinds[name] for name in names],
        "position_embedding_type": "rope" if rotates else None,
        "hidden_act": "silu",
    }
    if rotates:
        made["rope_parameters"] = write_rope(attention.config.position)
    channel = layer_of(model, 0).channel
    if stack.channel_of(0)[0] == "moe":
        hidden = channel.up.shape[-1]
        made |= {
            "num_local_experts": channel.config.experts,
            "num_experts_per_tok": channel.config.top_k,
            "intermediate_size": hidden,
            "shared_intermediate_size": channel.config.shared * hidden,
        }
    else:
        hidden = channel.up.kernel.shape[-1]
        made |= {
            "num_local_experts": 0,
            "intermediate_size": hidden,
            "shared_intermediate_size": hidden,
        }
    heads = write_scaled(model, attention)
    del heads["head_dim"]
    return heads | write_inner(mixers) | made


def halves(count: int) -> list[np.ndarray]:
    """Returns the order of two parts one after the other."""
    return np.split(np.arange(count), 2)


def _experts() -> Pairs:
    """Returns the pairs of a router and of experts whose gates and inputs are one array (experts, 2 hidden, width)."""
    return (
        transposed("block_sparse_moe.router.layer.weight", "channel/router/kernel"),
        Pair(
            ("block_sparse_moe.input_linear.weight",),
            ("channel/gate", "channel/up"),
            lambda x: tuple(np.split(np.swapaxes(x, 1, 2), 2, axis=2)),
            lambda *x: (np.swapaxes(np.concatenate(x, axis=2), 1, 2),),
        ),
        Pair(
            ("block_sparse_moe.output_linear.weight",),
            ("channel/down",),
            lambda x: (np.swapaxes(x, 1, 2),),
            lambda x: (np.swapaxes(x, 1, 2),),
        ),
    )


def _shared(where: str) -> Pairs:
    inputs = fused("shared_mlp.input_linear", (f"{where}/gate", f"{where}/up"), halves)
    return *inputs, *linear("shared_mlp.output_linear", f"{where}/down")


PARTS = {
    "": NORMS,
    "attention": ATTENTION,
    "mamba2": mixer("mamba"),
    "moe": (*_experts(), *_shared("channel/shared")),
    "swiglu": _shared("channel"),
}


GRANITE = Family(
    "GraniteForCausalLM",
    "granite",
    read=read,
    write=write,
    outer=OUTER,
    layer="model.layers.{}.",
    parts=lambda _: {"": NORMS, "attention": ATTENTION, "swiglu": GLU},
)
GRANITE_HYBRID = Family(
    "GraniteMoeHybridForCausalLM",
    "granitemoehybrid",
    read=read_hybrid,
    write=write_hybrid,
    outer=OUTER,
    layer="model.layers.{}.",
    parts=lambda _: PARTS,
)
