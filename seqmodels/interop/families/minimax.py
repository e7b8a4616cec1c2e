"""MiniMax: Lightning Attention and softmax attention with experts, on a residual stream that each norm replaces."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from seqmodels.config import StackConfig
from seqmodels.interop.families.llama import (
    ATTENTION,
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
from seqmodels.interop.families.mixtral import experts
from seqmodels.interop.family import Family, Pairs, fused, linear, norm
from seqmodels.interop.options import Options
from seqmodels.interop.rope import read_rope, write_rope

KINDS = {"linear_attention": "lightning_attention", "full_attention": "attention"}
PLACES = ("full_attn", "linear_attn", "mlp")


def read(options: Options) -> dict[str, Any]:
    """Returns our config."""
    options.only("hidden_act", "silu")  # of Lightning Attention too
    options.ignore("block_size")
    sizes = read_sizes(options)
    epsilon = options.take("rms_norm_eps", 1e-5)
    heads = read_heads(options)
    kinds = options.take("layer_types", None)
    if kinds is None:
        kinds = ["linear_attention" if layer % 2 else "full_attention" for layer in range(sizes["depth"])]
    if len(kinds) != sizes["depth"] or not set(kinds) <= KINDS.keys():
        known = " or ".join(KINDS)
        options.refuse("layer_types", kinds, f"{known} for each of num_hidden_layers={sizes['depth']}")
    pattern = shortest([KINDS[kind] for kind in kinds])
    mixers = {
        "lightning_attention": {"heads": heads["heads"], "head_dim": heads["head_dim"]},
        "attention": heads
        | {
            "position": read_rope(options, base=1_000_000.0),
            "window": options.take("sliding_window", None),
        },
    }
    channel = {
        "experts": options.take("num_local_experts", 8),
        "top_k": options.take("num_experts_per_tok", 2),
        "hidden": options.take("intermediate_size"),
    }
    return sizes | {
        "norm_options": {"epsilon": epsilon},
        "norm_position": "stream",
        "residual_scale": _factor(options, "alpha"),
        "branch_scale": _factor(options, "beta"),
        "pattern": pattern,
        "mixers": {name: mixers[name] for name in pattern},
        "channel": "moe",
        "channels": {"moe": channel},
    }


def _factor(options: Options, name: str) -> float:
    """Returns the factor on the stream, "alpha", or on the branches, "beta", which is one for all layers."""
    first, *others = (f"{place}_{name}_factor" for place in PLACES)
    factor = options.take(first, 1)
    for other in others:
        if options.take(other, 1) != factor:
            options.refuse(other, options.take(other, 1), f"{first}={factor!r}")
    return float(factor)


def write(model: Any) -> dict[str, Any]:
    """Returns their options."""
    config, (names, mixers) = model.config.stack, mixers_of(model)
    attention, channel = mixers["attention"], layer_of(model, 0).channel
    kinds = {ours: theirs for theirs, ours in KINDS.items()}
    factors = {"alpha": config.residual_scale, "beta": config.branch_scale}
    return (
        write_sizes(model)
        | write_heads(attention)
        | {f"{place}_{name}_factor": value for place in PLACES for name, value in factors.items()}
        | {
            "layer_types": [kinds[name] for name in names],
            "rope_parameters": write_rope(attention.config.position),
            "sliding_window": attention.config.window,
            "hidden_act": "silu",
            "num_local_experts": channel.config.experts,
            "num_experts_per_tok": channel.config.top_k,
            "intermediate_size": channel.up.shape[-1],
        }
    )


def _parts(stack: StackConfig) -> Mapping[str, Pairs]:
    heads = stack.mixers.get("lightning_attention", {}).get("heads", 1)

    def orders(count: int) -> list[np.ndarray]:
        """The outputs of each head are its query, key and value, one after another."""
        return [part.reshape(-1) for part in np.split(np.arange(count).reshape(heads, -1), 3, axis=1)]

    where = "block_sparse_moe"
    return {
        "": NORMS,
        "attention": ATTENTION,
        "lightning_attention": (
            *fused("self_attn.qkv_proj", ("mixer/query", "mixer/key", "mixer/value"), orders),
            *linear("self_attn.output_gate", "mixer/gate"),
            *norm("self_attn.norm", "mixer/norm"),
            *linear("self_attn.out_proj", "mixer/output"),
        ),
        "moe": experts(
            f"{where}.gate", where + ".experts.{}", ("w1", "w3", "w2"), stack.channels["moe"]["experts"]
        ),
    }


MINIMAX = Family(
    "MiniMaxForCausalLM",
    "minimax",
    read=read,
    write=write,
    outer=OUTER,
    layer="model.layers.{}.",
    parts=_parts,
    # Decays, which follow from the number of heads and layers.
    unread=r"self_attn\.(slope_rate|(query|key|diagonal)_decay)$",
)
