"""Falcon-H1: Mamba-2 and rotary attention side by side in each layer, with a factor on nearly every part."""

from typing import Any

from seqmodels.interop.families.llama import (
    ATTENTION,
    layer_of,
    read_heads,
    read_sizes,
    write_heads,
    write_sizes,
)
from seqmodels.interop.families.mamba2 import mixer, read_limits, write_limits
from seqmodels.interop.family import Family, linear, moved, norm, same, transposed
from seqmodels.interop.options import THEIR_ACTIVATIONS, Options
from seqmodels.interop.rope import read_rope, write_rope

PARTS = {
    "": (*norm("input_layernorm", "mixer_norm"), *norm("pre_ff_layernorm", "channel_norm")),
    "parallel": (
        *moved(mixer("mamba"), "mixer", "mixer/mamba2"),
        *moved(ATTENTION, "mixer", "mixer/attention"),
    ),
    "swiglu": (
        *linear("feed_forward.gate_proj", "channel/gate"),
        *linear("feed_forward.up_proj", "channel/up"),
        *linear("feed_forward.down_proj", "channel/down"),
    ),
}


def read(options: Options) -> dict[str, Any]:
    """Returns our config."""
    options.ignore("mamba_chunk_size", "mamba_expand", "mlp_expansion_factor", "num_logits_to_keep")
    options.ignore("time_step_floor", "time_step_max", "time_step_min", "time_step_rank")
    options.only("mamba_use_mlp", True)
    options.only("attn_layer_indices", None)
    options.only("hidden_act", "silu")  # of Mamba-2 too
    sizes = read_sizes(options)
    gate, down = options.take("mlp_multipliers", None) or (1.0, 1.0)
    channel = {
        "hidden": options.take("intermediate_size"),
        "bias": options.take("mlp_bias", False),
        "gate_scale": float(gate),
        "scale": float(down),
    }
    attention = read_heads(options) | {
        "bias": options.take("attention_bias", False),
        "position": read_rope(options),
        "key_scale": float(options.take("key_multiplier", 1.0)),
    }
    branches = {"mamba2": _read_mamba(options, sizes["norm_options"]["epsilon"]), "attention": attention}
    scales = {
        name: {
            "mamba2": float(options.take(f"ssm_{place}_multiplier", 1.0)),
            "attention": float(options.take(f"attention_{place}_multiplier", 1.0)),
        }
        for name, place in (("input_scales", "in"), ("scales", "out"))
    }
    embedding = float(options.take("embedding_multiplier", 1.0))
    return sizes | {
        "embedding_scale": None if embedding == 1 else embedding,
        "logit_scale": float(options.take("lm_head_multiplier", 1.0)),
        "pattern": ("parallel",),
        "mixers": {"parallel": {"branches": branches, **scales}},
        "channel": "swiglu",
        "channels": {"swiglu": channel},
    }


def _read_mamba(options: Options, epsilon: float) -> dict[str, Any]:
    inner = options.take("mamba_d_ssm", 1024)
    if inner is None:
        inner = options.take("mamba_expand", 2) * options.take("hidden_size")
    heads, size = options.take("mamba_n_heads", 128), options.take("mamba_d_head", "auto")
    size = inner // heads if size == "auto" else size
    if heads * size != inner:
        options.refuse("mamba_n_heads", heads, f"mamba_d_ssm / mamba_d_head = {inner / size:g}")
    bias = options.take("mamba_proj_bias", False)
    if options.take("projectors_bias", False) != bias:
        options.refuse("projectors_bias", not bias, f"mamba_proj_bias={bias}")
    before = options.take("mamba_norm_before_gate", True)
    return {
        "inner": inner,
        "state_size": options.take("mamba_d_state", 256),
        "head_dim": size,
        "groups": options.take("mamba_n_groups", 1),
        "taps": options.take("mamba_d_conv", 4),
        "conv_bias": options.take("mamba_conv_bias", True),
        "bias": bias,
        "scales": tuple(map(float, options.take("ssm_multipliers", None) or (1.0,) * 5)),
        "norm": ("before" if before else "after") if options.take("mamba_rms_norm", False) else "none",
        "dt_limit": read_limits(options),
        "epsilon": epsilon,
    }


def write(model: Any) -> dict[str, Any]:
    """Returns their options."""
    config, block = model.config, layer_of(model, 0)
    attention, own, channel = block.mixer.attention, block.mixer.mamba2.config, block.channel
    made = {
        f"{theirs}_{place}_multiplier": getattr(block.mixer.config, name).get(ours, 1.0)
        for name, place in (("input_scales", "in"), ("scales", "out"))
        for ours, theirs in (("mamba2", "ssm"), ("attention", "attention"))
    }
    return (
        write_sizes(model)
        | write_heads(attention)
        | made
        | {
            "embedding_multiplier": config.input.embedding_scale or 1.0,
            "lm_head_multiplier": config.logit_scale,
            "key_multiplier": attention.config.key_scale,
            "attention_bias": attention.config.bias,
            "rope_parameters": write_rope(attention.config.position),
            "mlp_multipliers": [channel.config.gate_scale, channel.config.scale],
            "intermediate_size": channel.up.kernel.shape[-1],
            "hidden_act": THEIR_ACTIVATIONS[channel.config.activation or "silu"],
            "mlp_bias": channel.config.bias,
            "mamba_d_ssm": own.channels,
            "mamba_d_state": own.state_size,
            "mamba_n_heads": own.heads,
            "mamba_d_head": own.head_dim,
            "mamba_n_groups": own.groups,
            "mamba_d_conv": own.taps,
            "mamba_conv_bias": own.conv_bias,
            "mamba_proj_bias": own.bias,
            "projectors_bias": own.bias,
            "ssm_multipliers": list(own.scales),
            "mamba_rms_norm": own.norm != "none",
            "mamba_norm_before_gate": own.norm != "after",
            "time_step_limit": write_limits(own.dt_limit),
        }
    )


FALCON_H1 = Family(
    "FalconH1ForCausalLM",
    "falcon_h1",
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
