"""Mixtral and Qwen3-MoE: decoders like Mistral and Qwen3 with a mixture of experts in each layer."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from seqmodels.config import StackConfig
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
from seqmodels.interop.family import Family, Pairs, stacked, transposed
from seqmodels.interop.options import Options
from seqmodels.interop.rope import read_rope, write_rope


def experts(router: str, expert: str, names: tuple[str | None, str, str], count: int) -> Pairs:
    """Returns the pairs of a router and of the matrices of all experts.

    Args:
      router: name of the router.
      expert: prefix of the names of an expert, with "{}" for its number.
      names: names of its gate, None if it has none, its inputs and its outputs.
      count: number of experts.
    """
    return (
        transposed(f"{router}.weight", "channel/router/kernel"),
        *(
            stacked(
                tuple(f"{expert.format(number)}.{theirs}.weight" for number in range(count)),
                f"channel/{ours}",
                transpose=True,
            )
            for ours, theirs in zip(("gate", "up", "down"), names, strict=True)
            if theirs is not None
        ),
    )


def _read(options: Options, *, qwen: bool) -> dict[str, Any]:
    options.only("hidden_act", "silu")
    sizes = read_sizes(options)
    attention = read_heads(options) | {"position": read_rope(options)}
    channel = {"top_k": options.take("num_experts_per_tok")}
    window = options.take("sliding_window", None)
    if qwen:
        options.only("decoder_sparse_step", 1)
        options.only("mlp_only_layers", [], None)
        options.ignore("intermediate_size", "max_window_layers")
        options.only("use_sliding_window", False)
        attention |= {"qk_norm": True, "norm_epsilon": sizes["norm_options"]["epsilon"]}
        attention["bias"], window = options.take("attention_bias", False), None
        count = options.take("num_local_experts", None) or options.take("num_experts")
        hidden = options.take("moe_intermediate_size")
        channel["normalize"] = options.take("norm_topk_prob", False)
    else:
        count, hidden = options.take("num_local_experts"), options.take("intermediate_size")
    channel |= {"experts": count, "hidden": hidden}
    pattern, mixers = windowed(options, attention, window, sizes["depth"])
    return sizes | {"pattern": pattern, "mixers": mixers, "channel": "moe", "channels": {"moe": channel}}


def _write(model: Any, *, qwen: bool) -> dict[str, Any]:
    block = layer_of(model, 0)
    channel, hidden = block.channel.config, block.channel.up.shape[-1]
    made = (
        write_sizes(model)
        | write_heads(block.mixer)
        | {
            "rope_parameters": write_rope(block.mixer.config.position),
            "hidden_act": "silu",
            "num_experts_per_tok": channel.top_k,
        }
    )
    if not qwen:
        return (
            made | write_windows(model) | {"num_local_experts": channel.experts, "intermediate_size": hidden}
        )
    return made | {
        "attention_bias": block.mixer.config.bias,
        "num_experts": channel.experts,
        "moe_intermediate_size": hidden,
        "norm_topk_prob": channel.normalize,
        "decoder_sparse_step": 1,
    }


def _parts(stack: StackConfig, *, qwen: bool) -> Mapping[str, Pairs]:
    count = stack.channels["moe"]["experts"]
    names = ("gate_proj", "up_proj", "down_proj") if qwen else ("w1", "w3", "w2")
    where = "mlp" if qwen else "block_sparse_moe"
    return {
        "": NORMS,
        "attention": ATTENTION,
        "moe": experts(f"{where}.gate", where + ".experts.{}", names, count),
    }


def _family(architecture: str, model_type: str, *, qwen: bool) -> Family:
    return Family(
        architecture,
        model_type,
        read=partial(_read, qwen=qwen),
        write=partial(_write, qwen=qwen),
        outer=OUTER,
        layer="model.layers.{}.",
        parts=partial(_parts, qwen=qwen),
    )


MIXTRAL = _family("MixtralForCausalLM", "mixtral", qwen=False)
QWEN3_MOE = _family("Qwen3MoeForCausalLM", "qwen3_moe", qwen=True)
