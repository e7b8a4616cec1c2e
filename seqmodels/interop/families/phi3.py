"""Phi-3: a decoder like Llama, with one matrix for queries, keys and values, and one for gates and inputs."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from seqmodels.config import StackConfig
from seqmodels.interop.families.llama import (
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
from seqmodels.interop.family import Family, Pairs, fused, linear
from seqmodels.interop.options import THEIR_ACTIVATIONS, Options
from seqmodels.interop.rope import read_rope, write_rope


def read(options: Options) -> dict[str, Any]:
    """Returns our config."""
    sizes = read_sizes(options)
    attention = read_heads(options) | {"position": read_rope(options, partial=True)}
    window = options.take("sliding_window", None)
    pattern, mixers = windowed(options, attention, window, sizes["depth"])
    channel = {
        "hidden": options.take("intermediate_size"),
        "activation": options.activation("hidden_act", "silu"),
    }
    return sizes | {
        "pattern": pattern,
        "mixers": mixers,
        "channel": "swiglu",
        "channels": {"swiglu": channel},
    }


def write(model: Any) -> dict[str, Any]:
    """Returns their options."""
    block = layer_of(model, 0)
    made = write_sizes(model) | write_heads(block.mixer) | write_windows(model)
    if block.mixer.config.size * block.mixer.config.heads == made["hidden_size"]:
        del made["head_dim"]
    return made | {
        "rope_parameters": write_rope(block.mixer.config.position),
        "intermediate_size": block.channel.up.kernel.shape[-1],
        "hidden_act": THEIR_ACTIVATIONS[block.channel.config.activation or "silu"],
    }


def parts(stack: StackConfig) -> Mapping[str, Pairs]:
    """Returns the pairs within a layer."""
    heads = next(iter(stack.mixers.values()))
    share = heads["heads"] + 2 * heads["kv_heads"]

    def attention(count: int) -> list[np.ndarray]:
        size = count // share
        return np.split(
            np.arange(count), [heads["heads"] * size, (heads["heads"] + heads["kv_heads"]) * size]
        )

    def halves(count: int) -> list[np.ndarray]:
        return np.split(np.arange(count), 2)

    return {
        "": NORMS,
        "attention": (
            *fused("self_attn.qkv_proj", ("mixer/query", "mixer/key", "mixer/value"), attention),
            *linear("self_attn.o_proj", "mixer/output"),
        ),
        "swiglu": (
            *fused("mlp.gate_up_proj", ("channel/gate", "channel/up"), halves),
            *linear("mlp.down_proj", "channel/down"),
        ),
    }


PHI3 = Family(
    "Phi3ForCausalLM", "phi3", read=read, write=write, outer=OUTER, layer="model.layers.{}.", parts=parts
)
