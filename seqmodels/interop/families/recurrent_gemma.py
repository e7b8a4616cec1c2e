"""RecurrentGemma: Griffin's recurrent blocks and attention with a window."""

from typing import Any

import jax.numpy as jnp

from seqmodels.interop.families.llama import (
    layer_of,
    read_heads,
    read_sizes,
    shortest,
    write_heads,
    write_sizes,
)
from seqmodels.interop.family import Family, convolution, linear, norm, same, stacked, transposed
from seqmodels.interop.options import Options
from seqmodels.interop.rope import read_rope, write_rope

KINDS = {"recurrent": "rg_lru", "attention": "attention"}
RECURRENT = (
    *linear("temporal_block.linear_y", "mixer/gate"),
    *linear("temporal_block.linear_x", "mixer/input"),
    *convolution("temporal_block.conv_1d", "mixer/convolution"),
    stacked(
        ("temporal_block.rg_lru.recurrent_gate_weight", "temporal_block.rg_lru.input_gate_weight"),
        "mixer/gates",
    ),
    stacked(
        ("temporal_block.rg_lru.recurrent_gate_bias", "temporal_block.rg_lru.input_gate_bias"),
        "mixer/gate_biases",
    ),
    same("temporal_block.rg_lru.recurrent_param", "mixer/decay"),
    *linear("temporal_block.linear_out", "mixer/output"),
)
PARTS = {
    "": (*norm("temporal_pre_norm", "mixer_norm"), *norm("channel_pre_norm", "channel_norm")),
    "rg_lru": RECURRENT,
    "attention": (
        *linear("temporal_block.q_proj", "mixer/query"),
        *linear("temporal_block.k_proj", "mixer/key"),
        *linear("temporal_block.v_proj", "mixer/value"),
        *linear("temporal_block.o_proj", "mixer/output"),
    ),
    "geglu": (
        *linear("mlp_block.gate_proj", "channel/gate"),
        *linear("mlp_block.up_proj", "channel/up"),
        *linear("mlp_block.down_proj", "channel/down"),
    ),
}


def embedding_scale(width: int) -> float:
    """Returns the root of the width as the models round it."""
    return float(jnp.bfloat16(width**0.5))


def read(options: Options) -> dict[str, Any]:
    """Returns our config."""
    options.ignore("w_init_variance_scale", "final_w_init_variance_scale")
    options.only("hidden_activation", "gelu_pytorch_tanh")
    sizes = read_sizes(options)
    sizes["norm_options"]["unit_offset"] = True
    heads, width = options.take("num_attention_heads"), sizes["width"]
    attention = read_heads(options) | {
        "position": read_rope(options, fraction=0.5, partial=True),
        "window": options.take("attention_window_size", 2048),
        "bias": options.take("attention_bias", False),
        "output_bias": True,
    }
    recurrent = {
        "heads": heads,
        "state_size": options.take("lru_width", None) or width,
        "taps": options.take("conv1d_width", 4),
    }
    kinds = options.take("block_types", ("recurrent", "recurrent", "attention"))
    for kind in kinds:
        if kind not in KINDS:
            options.refuse("block_types", kind, " or ".join(KINDS))
    every = [KINDS[kinds[layer % len(kinds)]] for layer in range(sizes["depth"])]
    mixers = {"attention": attention, "rg_lru": recurrent}
    hidden = options.take("intermediate_size")
    if hidden % 2:
        options.refuse("intermediate_size", hidden, "an even number")
    return sizes | {
        "pattern": shortest(every),
        "mixers": {name: mixers[name] for name in dict.fromkeys(every)},
        "channel": "geglu",
        "channels": {"geglu": {"hidden": hidden // 2, "activation": "gelu", "bias": True}},
        "embedding_scale": embedding_scale(width),
        "logit_cap": options.take("logits_soft_cap", 30.0),
    }


def write(model: Any) -> dict[str, Any]:
    """Returns their options."""
    layers = [layer_of(model, layer) for layer in range(model.config.stack.depth)]
    names = {ours: theirs for theirs, ours in KINDS.items()}
    kinds = [names[model.config.stack.mixer_of(layer)[0]] for layer in range(len(layers))]
    attention = layers[kinds.index("attention")].mixer if "attention" in kinds else None
    recurrent = layers[kinds.index("recurrent")].mixer
    made = write_sizes(model) | {
        "num_attention_heads": recurrent.config.heads,
        "lru_width": recurrent.config.channels,
        "conv1d_width": recurrent.config.taps,
        "block_types": list(shortest(kinds)),
        "intermediate_size": 2 * layers[0].channel.up.kernel.shape[-1],
        "hidden_activation": "gelu_pytorch_tanh",
        "logits_soft_cap": model.config.logit_cap,
    }
    if attention is None:
        return made
    return (
        made
        | write_heads(attention)
        | {
            "attention_window_size": attention.config.window,
            "attention_bias": attention.config.bias,
            "rope_parameters": write_rope(attention.config.position),
        }
    )


RECURRENT_GEMMA = Family(
    "RecurrentGemmaForCausalLM",
    "recurrent_gemma",
    read=read,
    write=write,
    outer=(
        same("model.embed_tokens.weight", "embedding/table"),
        *norm("model.final_norm", "norm"),
        transposed("lm_head.weight", "head/kernel"),
    ),
    layer="model.layers.{}.",
    parts=lambda _: PARTS,
)
