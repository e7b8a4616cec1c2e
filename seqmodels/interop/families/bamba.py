"""Bamba: Mamba-2 and rotary attention, each followed by a gated linear unit."""

from typing import Any

from seqmodels.interop.families.llama import (
    ATTENTION,
    layer_of,
    mixers_of,
    read_heads,
    read_sizes,
    shortest,
    write_heads,
    write_sizes,
)
from seqmodels.interop.families.mamba2 import mixer, read_inner, write_inner
from seqmodels.interop.family import Family, linear, norm, same, transposed
from seqmodels.interop.options import THEIR_ACTIVATIONS, Options
from seqmodels.interop.rope import read_rope, write_rope

PARTS = {
    "": (*norm("input_layernorm", "mixer_norm"), *norm("pre_ff_layernorm", "channel_norm")),
    "attention": ATTENTION,
    "mamba2": mixer("mamba"),
    "swiglu": (
        *linear("feed_forward.gate_proj", "channel/gate"),
        *linear("feed_forward.up_proj", "channel/up"),
        *linear("feed_forward.down_proj", "channel/down"),
    ),
}


def read(options: Options) -> dict[str, Any]:
    """Returns our config."""
    options.ignore("num_logits_to_keep", "z_loss_coefficient")
    options.only("hidden_act", "silu")  # of Mamba-2 too
    sizes = read_sizes(options)
    attention = read_heads(options) | {
        "bias": options.take("attention_bias", False),
        "position": read_rope(options, fraction=0.5, partial=True),
    }
    places = options.take("attn_layer_indices", None) or ()
    pattern = shortest(["attention" if layer in places else "mamba2" for layer in range(sizes["depth"])])
    inner = read_inner(options, sizes["norm_options"]["epsilon"], used="mamba2" in pattern)
    mixers = {"attention": attention, "mamba2": inner}
    channel = {"hidden": options.take("intermediate_size"), "bias": options.take("mlp_bias", False)}
    return sizes | {
        "pattern": pattern,
        "mixers": {name: mixers[name] for name in pattern},
        "channel": "swiglu",
        "channels": {"swiglu": channel},
    }


def write(model: Any) -> dict[str, Any]:
    """Returns their options."""
    names, mixers = mixers_of(model)
    attention = mixers["attention"]
    channel = layer_of(model, 0).channel
    return (
        write_sizes(model)
        | {name: value for name, value in write_heads(attention).items() if name != "head_dim"}
        | write_inner(mixers)
        | {
            "attention_bias": attention.config.bias,
            "rope_parameters": write_rope(attention.config.position)
            | {"partial_rotary_factor": attention.config.position.fraction},
            "attn_layer_indices": [layer for layer, name in enumerate(names) if name == "attention"],
            "intermediate_size": channel.up.kernel.shape[-1],
            "hidden_act": THEIR_ACTIVATIONS[channel.config.activation or "silu"],
            "mlp_bias": channel.config.bias,
        }
    )


BAMBA = Family(
    "BambaForCausalLM",
    "bamba",
    read=read,
    write=write,
    outer=(
        same("model.embed_tokens.weight", "embedding/table"),
        *norm("model.final_layernorm", "norm"),
        transposed("lm_head.weight", "head/kernel"),
    ),
    layer="model.layers.{}.",
    parts=lambda _: PARTS,
)
