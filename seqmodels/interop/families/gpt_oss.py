"""gpt-oss: attention with learned sinks, with a window in every other layer, and experts with biases."""

from typing import Any

import numpy as np

from seqmodels.interop.families.llama import (
    ATTENTION,
    NORMS,
    OUTER,
    layer_of,
    read_heads,
    read_sizes,
    windowed,
    write_heads,
    write_sizes,
    write_windows,
)
from seqmodels.interop.family import Family, Pair, linear, same
from seqmodels.interop.options import Options
from seqmodels.interop.rope import read_rope, write_rope


def alternating(theirs: str, ours: tuple[str, str]) -> Pair:
    """Returns the pair of an array of theirs whose last axis holds the entries of two of ours in turn."""
    return Pair(
        (theirs,),
        ours,
        lambda x: (x[..., ::2], x[..., 1::2]),
        lambda *x: (np.stack(x, axis=-1).reshape(*x[0].shape[:-1], -1),),
    )


PARTS = {
    "": NORMS,
    "attention": (*ATTENTION, same("self_attn.sinks", "mixer/sinks")),
    "moe": (
        *linear("mlp.router", "channel/router"),
        alternating("mlp.experts.gate_up_proj", ("channel/gate", "channel/up")),
        alternating("mlp.experts.gate_up_proj_bias", ("channel/gate_bias", "channel/up_bias")),
        same("mlp.experts.down_proj", "channel/down"),
        same("mlp.experts.down_proj_bias", "channel/down_bias"),
    ),
}


def read(options: Options) -> dict[str, Any]:
    """Returns our config."""
    options.only("hidden_act", "silu")
    options.ignore("experts_per_token", "initial_context_length")
    sizes = read_sizes(options)
    attention = read_heads(options) | {
        "position": read_rope(options, base=150_000.0),
        "bias": options.take("attention_bias", True),
        "sink_logits": True,
    }
    kinds = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(sizes["depth"])]
    pattern, mixers = windowed(
        options, attention, options.take("sliding_window", 128), sizes["depth"], kinds=kinds
    )
    channel = {
        "experts": options.take("num_local_experts"),
        "top_k": options.take("num_experts_per_tok", 4),
        "hidden": options.take("intermediate_size"),
        "bias": True,
        "gain": float(options.take("swiglu_alpha", 1.702)),
        "clamp": float(options.take("swiglu_limit", 7.0)),
        "offset": 1.0,
    }
    return sizes | {
        "pattern": pattern,
        "mixers": mixers,
        "channel": "moe",
        "channels": {"moe": channel},
    }


def write(model: Any) -> dict[str, Any]:
    """Returns their options."""
    block = layer_of(model, 0)
    channel = block.channel.config
    windows = write_windows(model)
    kind = "full_attention" if windows["sliding_window"] is None else "sliding_attention"
    return (
        write_sizes(model)
        | write_heads(block.mixer)
        | {"layer_types": [kind] * model.config.stack.depth}
        | windows
        | {
            "attention_bias": block.mixer.config.bias,
            "rope_parameters": write_rope(block.mixer.config.position),
            "hidden_act": "silu",
            "num_local_experts": channel.experts,
            "num_experts_per_tok": channel.top_k,
            "intermediate_size": block.channel.up.shape[-1],
            "swiglu_alpha": channel.gain,
            "swiglu_limit": channel.clamp,
        }
    )


GPT_OSS = Family(
    "GptOssForCausalLM",
    "gpt_oss",
    read=read,
    write=write,
    outer=OUTER,
    layer="model.layers.{}.",
    alternating=True,
    parts=lambda _: PARTS,
)
