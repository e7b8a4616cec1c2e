"""OLMo 2: norms of the outputs of branches, and of all queries and keys of a token together."""

from typing import Any

from seqmodels.interop.families.llama import (
    ATTENTION,
    GLU,
    OUTER,
    layer_of,
    read_heads,
    read_sizes,
    write_heads,
    write_sizes,
)
from seqmodels.interop.family import Family, norm
from seqmodels.interop.options import THEIR_ACTIVATIONS, Options
from seqmodels.interop.rope import read_rope, write_rope

NORMS = (
    *norm("post_attention_layernorm", "mixer_output_norm"),
    *norm("post_feedforward_layernorm", "channel_output_norm"),
)


def read(options: Options) -> dict[str, Any]:
    """Returns our config."""
    sizes = read_sizes(options)
    attention = read_heads(options) | {
        "bias": options.take("attention_bias", False),
        "position": read_rope(options),
        "qk_norm": True,
        "norm_heads": "all",
        "norm_epsilon": sizes["norm_options"]["epsilon"],
    }
    channel = {
        "hidden": options.take("intermediate_size"),
        "activation": options.activation("hidden_act", "silu"),
    }
    return sizes | {
        "pattern": ("attention",),
        "mixers": {"attention": attention},
        "channel": "swiglu",
        "channels": {"swiglu": channel},
        "norm_position": "output",
    }


def write(model: Any) -> dict[str, Any]:
    """Returns their options."""
    block = layer_of(model, 0)
    return (
        write_sizes(model)
        | write_heads(block.mixer)
        | {
            "attention_bias": block.mixer.config.bias,
            "rope_parameters": write_rope(block.mixer.config.position),
            "intermediate_size": block.channel.up.kernel.shape[-1],
            "hidden_act": THEIR_ACTIVATIONS[block.channel.config.activation or "silu"],
        }
    )


OLMO2 = Family(
    "Olmo2ForCausalLM",
    "olmo2",
    read=read,
    write=write,
    outer=OUTER,
    layer="model.layers.{}.",
    parts=lambda _: {"": NORMS, "attention": ATTENTION, "swiglu": GLU},
)
