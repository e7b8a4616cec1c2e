"""Qwen3-Next: Gated DeltaNet and gated attention in turn, each followed by a mixture of experts with a shared one."""

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
    shortest,
    write_heads,
    write_sizes,
)
from seqmodels.interop.families.mixtral import experts
from seqmodels.interop.family import Family, Pair, Pairs, convolution, linear, norm, same, transposed
from seqmodels.interop.options import Options
from seqmodels.interop.rope import read_rope, write_rope

KINDS = {"linear_attention": "gated_deltanet", "full_attention": "gated_attention"}
EVERY = 4


def read(options: Options) -> dict[str, Any]:
    """Returns our config."""
    options.only("hidden_act", "silu")
    options.only("decoder_sparse_step", 1)
    options.only("mlp_only_layers", [], None)
    options.ignore("intermediate_size")
    sizes = read_sizes(options)
    epsilon, depth = sizes["norm_options"]["epsilon"], sizes["depth"]
    sizes["norm_options"]["unit_offset"] = True
    attention = read_heads(options) | {
        "position": read_rope(options, fraction=0.25, partial=True),
        "bias": options.take("attention_bias", False),
        "norm_epsilon": epsilon,
        "norm_unit_offset": True,
    }
    delta = {
        "heads": options.take("linear_num_key_heads"),
        "value_heads": options.take("linear_num_value_heads"),
        "key_dim": options.take("linear_key_head_dim"),
        "value_dim": options.take("linear_value_head_dim"),
        "taps": options.take("linear_conv_kernel_dim", 4),
        "epsilon": epsilon,
    }
    every = options.take("full_attention_interval", EVERY)
    kinds = options.take("layer_types", None) or [
        "full_attention" if layer % every == every - 1 else "linear_attention" for layer in range(depth)
    ]
    for kind in kinds:
        if kind not in KINDS:
            options.refuse("layer_types", kind, " or ".join(KINDS))
    hidden, shared = options.take("moe_intermediate_size"), options.take("shared_expert_intermediate_size")
    if shared % hidden:
        options.refuse(
            "shared_expert_intermediate_size", shared, f"a multiple of moe_intermediate_size={hidden}"
        )
    moe = {
        "experts": options.take("num_experts"),
        "top_k": options.take("num_experts_per_tok"),
        "normalize": options.take("norm_topk_prob", True),
        "hidden": hidden,
        "shared": shared // hidden,
        "shared_gate": True,
    }
    mixers = {"gated_attention": attention, "gated_deltanet": delta}
    pattern = shortest([KINDS[kind] for kind in kinds])
    return sizes | {
        "pattern": pattern,
        "mixers": {name: mixers[name] for name in pattern},
        "channel": "moe",
        "channels": {"moe": moe},
    }


def write(model: Any) -> dict[str, Any]:
    """Returns their options."""
    stack = model.config.stack
    theirs = {ours: name for name, ours in KINDS.items()}
    kinds = [theirs[stack.mixer_of(layer)[0]] for layer in range(stack.depth)]
    attention = layer_of(model, kinds.index("full_attention")).mixer
    delta = layer_of(model, kinds.index("linear_attention")).mixer.config
    channel = layer_of(model, 0).channel
    hidden = channel.up.shape[-1]
    return (
        write_sizes(model)
        | write_heads(attention)
        | {
            "attention_bias": attention.config.bias,
            "rope_parameters": write_rope(attention.config.position)
            | {"partial_rotary_factor": attention.config.position.fraction},
            "layer_types": kinds,
            "linear_num_key_heads": delta.heads,
            "linear_num_value_heads": delta.outputs,
            "linear_key_head_dim": delta.sizes[0],
            "linear_value_head_dim": delta.sizes[1],
            "linear_conv_kernel_dim": delta.taps,
            "moe_intermediate_size": hidden,
            "shared_expert_intermediate_size": channel.config.shared * hidden,
            "num_experts": channel.config.experts,
            "num_experts_per_tok": channel.config.top_k,
            "norm_topk_prob": channel.config.normalize,
        }
    )


def grouped(theirs: str, ours: tuple[str, ...], groups: int, sizes: tuple[tuple[int, ...], ...]) -> Pair:
    """Returns the pair of a matrix of theirs that gives several parts, one group of heads after another.

    Args:
      groups: number of groups.
      sizes: per matrix of ours, the sizes of its parts in a group, in the order in which a group holds them.
    """
    count = sum(map(sum, sizes))
    columns, orders = iter(np.arange(groups * count).reshape(groups, count).T), []
    for own in sizes:
        parts = [np.stack([next(columns) for _ in range(size)], axis=1) for size in own]
        orders.append(np.concatenate([part.ravel() for part in parts]))

    def load(x):
        return tuple(x[order].T for order in orders)

    def save(*parts):
        whole = np.empty((groups * count, *parts[0].shape[:-1]), parts[0].dtype)
        for order, part in zip(orders, parts, strict=True):
            whole[order] = part.T
        return (whole,)

    return Pair((theirs,), ours, load, save)


def parts(stack: StackConfig) -> Mapping[str, Pairs]:
    """Returns the pairs within a layer."""
    names = ("gate_proj", "up_proj", "down_proj")
    made = {
        "": NORMS,
        "moe": (
            *experts("mlp.gate", "mlp.experts.{}", names, stack.channels["moe"]["experts"]),
            *linear("mlp.shared_expert.gate_proj", "channel/shared/gate"),
            *linear("mlp.shared_expert.up_proj", "channel/shared/up"),
            *linear("mlp.shared_expert.down_proj", "channel/shared/down"),
            transposed("mlp.shared_expert_gate.weight", "channel/shared_gate/kernel"),
        ),
    }
    if own := stack.mixers.get("gated_attention"):
        size = own["head_dim"]
        made["gated_attention"] = (
            grouped(
                "self_attn.q_proj.weight",
                ("mixer/query/kernel", "mixer/gate/kernel"),
                own["heads"],
                ((size,), (size,)),
            ),
            grouped(
                "self_attn.q_proj.bias",
                ("mixer/query/bias", "mixer/gate/bias"),
                own["heads"],
                ((size,), (size,)),
            ),
            *linear("self_attn.k_proj", "mixer/key"),
            *linear("self_attn.v_proj", "mixer/value"),
            *linear("self_attn.o_proj", "mixer/output"),
            *norm("self_attn.q_norm", "mixer/query_norm"),
            *norm("self_attn.k_norm", "mixer/key_norm"),
        )
    if own := stack.mixers.get("gated_deltanet"):
        each = own["value_heads"] // own["heads"]
        key, value = own["key_dim"], each * own["value_dim"]
        made["gated_deltanet"] = (
            grouped(
                "linear_attn.in_proj_qkvz.weight",
                ("mixer/memory/projection/kernel", "mixer/gate/kernel"),
                own["heads"],
                ((key, key, value), (value,)),
            ),
            grouped(
                "linear_attn.in_proj_ba.weight",
                ("mixer/memory/strength/kernel", "mixer/rate/kernel"),
                own["heads"],
                ((each,), (each,)),
            ),
            *convolution("linear_attn.conv1d", "mixer/memory/convolution"),
            same("linear_attn.A_log", "mixer/decay/log_rate"),
            same("linear_attn.dt_bias", "mixer/decay/bias"),
            *norm("linear_attn.norm", "mixer/norm"),
            *linear("linear_attn.out_proj", "mixer/output"),
        )
    return made


QWEN3_NEXT = Family(
    "Qwen3NextForCausalLM",
    "qwen3_next",
    read=read,
    write=write,
    outer=OUTER,
    layer="model.layers.{}.",
    parts=parts,
    unread=r"^mtp\.",
)
