"""Kimi Linear: Kimi Delta Attention and latent attention without positions in turn, with experts after the first layers."""

from collections.abc import Mapping
from typing import Any

from seqmodels.config import StackConfig
from seqmodels.interop.families.llama import (
    NORMS,
    OUTER,
    layer_of,
    mixers_of,
    read_sizes,
    shortest,
    write_sizes,
)
from seqmodels.interop.families.mixtral import experts
from seqmodels.interop.family import (
    Family,
    Pairs,
    linear,
    merged,
    merged_convolution,
    norm,
    reshaped,
    same,
    transposed,
)
from seqmodels.interop.options import Options

KINDS = {"linear_attention": "kda", "full_attention": "mla"}
CHANNELS = {"dense": "swiglu", "sparse": "moe"}
WHERE = "block_sparse_moe"


def read(options: Options) -> dict[str, Any]:
    """Returns our config."""
    options.only("hidden_act", "silu")
    options.only("attention_bias", False)
    options.ignore(
        "qk_head_dim", "head_dim", "model_max_length", "num_key_value_heads", "mtp", "moe_layer_freq"
    )
    options.only("mla_use_nope", True)
    options.only("moe_router_activation_func", "sigmoid")
    options.only("use_grouped_topk", True)
    options.only("num_nextn_predict_layers", 0)
    options.ignore("rope_theta", "rope_scaling", "rope_parameters", "v_head_dim", "q_lora_rank")
    sizes = read_sizes(options)
    depth, heads = sizes["depth"], options.take("num_attention_heads")
    kinds, own = _kinds(options, depth)
    mlp = options.take("mlp_layer_types", None)
    if mlp is None:
        first = options.take("first_k_dense_replace", 1)
        mlp = ["dense" if layer < first else "sparse" for layer in range(depth)]
    options.ignore("first_k_dense_replace")
    for name, values, known in (("layer_types", kinds, KINDS), ("mlp_layer_types", mlp, CHANNELS)):
        if len(values) != depth or not set(values) <= known.keys():
            options.refuse(name, values, f"{' or '.join(known)} for each of num_hidden_layers={depth}")
    mixers = {
        "kda": own | {"epsilon": sizes["norm_options"]["epsilon"]},
        "mla": {
            "heads": heads,
            "latent": options.take("kv_lora_rank"),
            "query_latent": options.take("q_lora_rank", None),
            "head_dim": options.take("qk_nope_head_dim"),
            "rope_dim": options.take("qk_rope_head_dim"),
            "value_dim": options.take("v_head_dim", None) or options.take("qk_nope_head_dim"),
            "position": "none",
        },
    }
    channels = {
        "swiglu": {"hidden": options.take("intermediate_size")},
        "moe": {
            "experts": options.take("num_experts"),
            "top_k": options.take("num_experts_per_token"),
            "hidden": options.take("moe_intermediate_size"),
            "shared": options.take("num_shared_experts"),
            "scores": "sigmoid",
            "normalize": options.take("moe_renormalize", True),
            "scale": float(options.take("routed_scaling_factor", 1.0)),
            "groups": options.take("num_expert_group", 1),
            "top_groups": options.take("topk_group", 1),
            "bias_rate": 0.001,
            "balance": 0.0,
            "z_loss": 0.0,
        },
    }
    names = [(KINDS[kind], CHANNELS[channel]) for kind, channel in zip(kinds, mlp, strict=True)]
    return sizes | {
        "pattern": shortest(["+".join(pair) for pair in names]),
        "mixers": {name: mixers[name] for name, _ in dict.fromkeys(names)},
        "channels": {name: channels[name] for _, name in dict.fromkeys(names)},
    }


def _kinds(options: Options, depth: int) -> tuple[list[str], dict[str, Any]]:
    """Returns the kind of each layer and the options of the linear ones, from the names of either release."""
    given = options.take("linear_attn_config", None)
    if given is None:
        own = {
            "heads": options.take("linear_num_heads"),
            "head_dim": options.take("linear_head_dim"),
            "taps": options.take("linear_conv_kernel_dim", 4),
        }
        return list(options.take("layer_types")), own
    own = {
        "heads": given["num_heads"],
        "head_dim": given["head_dim"],
        "taps": given["short_conv_kernel_size"],
    }
    full = given["full_attn_layers"]  # counted from 1
    return ["full_attention" if layer + 1 in full else "linear_attention" for layer in range(depth)], own


def write(model: Any) -> dict[str, Any]:
    """Returns their options."""
    stack = model.config.stack
    names, mixers = mixers_of(model)
    kda, mla = mixers["kda"].config, mixers["mla"].config
    kinds = {ours: theirs for theirs, ours in KINDS.items()}
    channels = [stack.channel_of(layer)[0] for layer in range(stack.depth)]
    dense, moe = (layer_of(model, channels.index(name)).channel for name in ("swiglu", "moe"))
    return write_sizes(model) | {
        "hidden_act": "silu",
        "layer_types": [kinds[name] for name in names],
        "mlp_layer_types": ["sparse" if name == "moe" else "dense" for name in channels],
        "linear_num_heads": kda.heads,
        "linear_head_dim": kda.sizes[0],
        "linear_conv_kernel_dim": kda.taps,
        "num_attention_heads": mla.heads,
        "num_key_value_heads": mla.heads,
        "kv_lora_rank": mla.latent,
        "q_lora_rank": mla.query_latent,
        "qk_nope_head_dim": mla.head_dim,
        "qk_rope_head_dim": mla.rope_dim,
        "v_head_dim": mla.value_dim,
        "intermediate_size": dense.up.kernel.shape[-1],
        "num_experts": moe.config.experts,
        "num_experts_per_token": moe.config.top_k,
        "moe_intermediate_size": moe.up.shape[-1],
        "num_shared_experts": moe.config.shared,
        "moe_renormalize": moe.config.normalize,
        "routed_scaling_factor": moe.config.scale,
        "num_expert_group": moe.config.groups,
        "topk_group": moe.config.top_groups,
    }


def parts(stack: StackConfig) -> Mapping[str, Pairs]:
    """Returns the pairs within a layer."""
    made: dict[str, Pairs] = {"": NORMS, "swiglu": units(WHERE, "channel")}
    if moe := stack.channels.get("moe"):
        made["moe"] = (
            *experts(f"{WHERE}.gate", WHERE + ".experts.{}", ("w1", "w3", "w2"), moe["experts"]),
            same(f"{WHERE}.gate.e_score_correction_bias", "channel/bias"),
            *units(f"{WHERE}.shared_experts", "channel/shared"),
        )
    if own := stack.mixers.get("kda"):
        made["kda"] = kda("self_attn", own["heads"], own["head_dim"])
    if "mla" in stack.mixers:
        direct = stack.mixers["mla"]["query_latent"] is None
        made["mla"] = (
            transposed(f"self_attn.{'q_proj' if direct else 'q_b_proj'}.weight", "mixer/query/kernel"),
            transposed("self_attn.q_a_proj.weight", "mixer/query_down/kernel"),
            *norm("self_attn.q_a_layernorm", "mixer/query_norm"),
            transposed("self_attn.kv_a_proj_with_mqa.weight", "mixer/latent/kernel"),
            *norm("self_attn.kv_a_layernorm", "mixer/latent_norm"),
            transposed("self_attn.kv_b_proj.weight", "mixer/expand/kernel"),
            transposed("self_attn.o_proj.weight", "mixer/output/kernel"),
        )
    return made


def units(theirs: str, ours: str) -> Pairs:
    """Returns the pairs of a gated linear unit."""
    names = (("gate_proj", "gate"), ("up_proj", "up"), ("down_proj", "down"))
    return tuple(pair for name, own in names for pair in linear(f"{theirs}.{name}", f"{ours}/{own}"))


def kda(where: str, heads: int, size: int) -> Pairs:
    """Returns the pairs of Kimi Delta Attention whose names begin with `where`."""
    three = (heads * size,) * 3
    return (
        merged(tuple(f"{where}.{name}_proj" for name in "qkv"), "mixer/memory/projection", three),
        merged_convolution(
            tuple(f"{where}.{name}_conv1d" for name in "qkv"), "mixer/memory/convolution", three
        ),
        *linear(f"{where}.b_proj", "mixer/memory/strength"),
        *linear(f"{where}.f_a_proj", "mixer/rate/inner"),
        *linear(f"{where}.f_b_proj", "mixer/rate/outer"),
        reshaped(f"{where}.A_log", "mixer/decay/log_rate", (1, 1, heads, 1), (heads,)),
        reshaped(f"{where}.dt_bias", "mixer/decay/bias", (heads * size,), (heads, size)),
        *linear(f"{where}.g_a_proj", "mixer/gate/inner"),
        transposed(f"{where}.g_b_proj.weight", "mixer/gate/outer/kernel"),
        same(f"{where}.o_norm.weight", "mixer/norm/scale"),
        *linear(f"{where}.o_proj", "mixer/output"),
    )


KIMI_LINEAR = Family(
    "KimiLinearForCausalLM",
    "kimi_linear",
    read=read,
    write=write,
    outer=OUTER,
    layer="model.layers.{}.",
    parts=parts,
    constants={"mixer/gate/outer/bias": 0.0},
)
