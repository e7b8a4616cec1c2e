"""Nemotron-H: Mamba-2 and attention without positions, with perceptrons or experts without gates after some of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from layers.channel.moe import MoE
from seqmodels.config import StackConfig
from seqmodels.interop.families.llama import layer_of, mixers_of, read_heads, shortest, write_heads
from seqmodels.interop.families.mamba2 import mixer, read_limits, write_limits
from seqmodels.interop.families.mixtral import experts
from seqmodels.interop.family import Family, Pairs, linear, norm, same, transposed
from seqmodels.interop.options import THEIR_ACTIVATIONS, Options

# Each layer of theirs is a mixer or a channel mixer; a layer of ours is a mixer, and a channel mixer if one follows.
LETTERS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
KINDS = {
    "mamba": "mamba2",
    "linear_attention": "mamba2",
    "attention": "attention",
    "full_attention": "attention",
}
THEIRS = {"mamba2": "linear_attention", "attention": "full_attention"}
# Initial values, and which code runs.
WITHOUT_EFFECT = (
    "chunk_size",
    "expand",
    "mamba_ssm_cache_dtype",
    "moe_shared_expert_overlap",
    "mtp_hybrid_override_pattern",
    "mtp_layers_block_type",
    "n_shared_experts",
    "num_logits_to_keep",
    "rescale_prenorm_residual",
    "residual_in_fp32",
    "time_step_floor",
    "time_step_max",
    "time_step_min",
    "time_step_rank",
    "use_mamba_kernels",
)
EXPERTS = (
    "moe_intermediate_size",
    "moe_latent_size",
    "moe_shared_expert_intermediate_size",
    "n_group",
    "n_routed_experts",
    "norm_topk_prob",
    "num_experts_per_tok",
    "routed_scaling_factor",
    "topk_group",
)
PARTS: Mapping[str, Pairs] = {
    "mamba2": (*norm("norm", "mixer_norm"), *mixer("mixer")),
    "attention": (
        *norm("norm", "mixer_norm"),
        *linear("mixer.q_proj", "mixer/query"),
        *linear("mixer.k_proj", "mixer/key"),
        *linear("mixer.v_proj", "mixer/value"),
        *linear("mixer.o_proj", "mixer/output"),
    ),
    "mlp": (
        *norm("norm", "channel_norm"),
        *linear("mixer.up_proj", "channel/up"),
        *linear("mixer.down_proj", "channel/down"),
    ),
}


def read(options: Options) -> dict[str, Any]:
    """Returns our config."""
    options.ignore(*WITHOUT_EFFECT)
    options.only("mamba_hidden_act", "silu")
    options.only("attention_bias", False)
    options.only("sliding_window", None)
    options.only("num_nextn_predict_layers", 0)
    epsilon = options.take("layer_norm_epsilon", 1e-5)
    pattern = _pattern(options)
    heads, size = options.take("mamba_num_heads", 128), options.take("mamba_head_dim", 64)
    mixers = {
        "mamba2": {
            "inner": heads * size,
            "head_dim": size,
            "state_size": options.take("ssm_state_size", 128),
            "groups": options.take("n_groups", 8),
            "taps": options.take("conv_kernel", 4),
            "conv_bias": options.take("use_conv_bias", True),
            "bias": options.take("use_bias", False),
            "dt_limit": read_limits(options),
            "epsilon": epsilon,
        },
        "attention": _read_attention(options),
    }
    for name in ("norm_eps", "rms_norm_eps"):
        options.only(name, epsilon)
    options.only("mamba_proj_bias", mixers["mamba2"]["bias"])
    activation, bias = options.activation("mlp_hidden_act", "relu2"), options.take("mlp_bias", False)
    options.ignore("intermediate_size", *EXPERTS)
    channels = {}
    if any("mlp" in each for each in pattern):
        channels["mlp"] = {
            "hidden": options.take("intermediate_size"),
            "activation": activation,
            "bias": bias,
        }
    if any("moe" in each for each in pattern):
        channels["moe"] = _read_experts(options, activation, bias)
    return {
        "vocab_size": options.take("vocab_size"),
        "width": options.take("hidden_size"),
        "depth": len(pattern),
        "pattern": shortest(pattern),
        "mixers": {name: own for name, own in mixers.items() if any(name in each for each in pattern)},
        "channel": "none",
        "channels": channels,
        "norm": "rms_norm",
        "norm_options": {"epsilon": epsilon},
        "tie_embeddings": options.take("tie_word_embeddings", False),
    }


def _read_attention(options: Options) -> dict[str, Any]:
    heads, named = read_heads(options), options.take("attention_head_dim", None)
    if named is not None and options.take("head_dim", named) != named:
        options.refuse("attention_head_dim", named, f"head_dim={heads['head_dim']}")
    return heads | {"head_dim": named or heads["head_dim"], "position": "none"}


def _read_experts(options: Options, activation: str, bias: bool) -> dict[str, Any]:
    hidden, shared = (
        options.take("moe_intermediate_size"),
        options.take("moe_shared_expert_intermediate_size"),
    )
    if shared % hidden:
        options.refuse("moe_shared_expert_intermediate_size", shared, f"a multiple of {hidden}")
    if bias:
        options.refuse("mlp_bias", bias, "False with experts")
    return {
        "experts": options.take("n_routed_experts", 8),
        "top_k": options.take("num_experts_per_tok", 2),
        "hidden": hidden,
        "latent": options.take("moe_latent_size", None),
        "shared": shared // hidden,
        "gated": False,
        "activation": activation,
        "scores": "sigmoid",
        "normalize": options.take("norm_topk_prob", True),
        "scale": float(options.take("routed_scaling_factor", 1.0)),
        "groups": options.take("n_group", 1),
        "top_groups": options.take("topk_group", 1),
        "bias_rate": 0.001,
        "balance": 0.0,
        "z_loss": 0.0,
    }


def _pattern(options: Options) -> list[str]:
    """Returns the entry of each layer of ours."""
    letters = options.take("hybrid_override_pattern", None)
    kinds = options.take("layers_block_type", None) or [LETTERS.get(each, each) for each in letters or ""]
    count = options.take("num_hidden_layers", None)
    if not kinds or count not in (None, len(kinds)):
        options.refuse("layers_block_type", kinds, f"the kinds of num_hidden_layers={count} layers")
    entries: list[str] = []
    for place, kind in enumerate(kinds):
        if kind in KINDS:
            entries.append(KINDS[kind])
        elif kind in ("mlp", "moe") and place and kinds[place - 1] in KINDS:
            entries[-1] += f"+{kind}"
        else:
            options.refuse(
                "layers_block_type", kind, f"{' or '.join(KINDS)}, or mlp or moe after one of them"
            )
    return entries


def numbers(stack: StackConfig) -> Sequence[tuple[int, int]]:
    """Returns the numbers of their layers that hold the mixer and the channel mixer of each of ours."""
    found, start = [], 0
    for layer in range(stack.depth):
        found.append((start, start + 1))
        start += 1 if stack.channel_of(layer) is None else 2
    return found


def write(model: Any) -> dict[str, Any]:
    """Returns their options."""
    config, (names, mixers) = model.config, mixers_of(model)
    layers = [layer_of(model, layer) for layer in range(config.stack.depth)]
    kinds, channels = [], {}
    for name, block in zip(names, layers, strict=True):
        kinds += [THEIRS[name]]
        if block.channel is not None:
            channels.setdefault("moe" if isinstance(block.channel, MoE) else "mlp", block.channel)
            kinds += ["moe" if isinstance(block.channel, MoE) else "mlp"]
    made = {
        "vocab_size": config.input.vocab_size,
        "hidden_size": config.stack.width,
        "layers_block_type": kinds,
        "layer_norm_epsilon": model.norm.config.epsilon,
        "tie_word_embeddings": config.tie_embeddings,
    }
    own = mixers["mamba2"].config
    made |= {
        "mamba_num_heads": own.heads,
        "mamba_head_dim": own.head_dim,
        "ssm_state_size": own.state_size,
        "n_groups": own.groups,
        "conv_kernel": own.taps,
        "use_conv_bias": own.conv_bias,
        "use_bias": own.bias,
        "mamba_proj_bias": own.bias,
        "time_step_limit": write_limits(own.dt_limit),
        # The full pass of transformers bounds step sizes by it, whatever the limit is, and takes its logarithm.
        "time_step_min": own.dt_limit[0] or 1e-9,
    }
    made |= write_heads(mixers["attention"])
    for channel in channels.values():
        made["mlp_hidden_act"] = THEIR_ACTIVATIONS[channel.config.activation or "gelu"]
        made["mlp_bias"] = channel.config.bias
    if "mlp" in channels:
        made["intermediate_size"] = channels["mlp"].up.kernel.shape[-1]
    return made | _write_experts(channels["moe"]) if "moe" in channels else made


def _write_experts(experts: MoE) -> dict[str, Any]:
    own, hidden = experts.config, experts.up.shape[-1]
    return {
        "n_routed_experts": own.experts,
        "num_experts_per_tok": own.top_k,
        "moe_intermediate_size": hidden,
        "moe_latent_size": own.latent,
        "moe_shared_expert_intermediate_size": own.shared * hidden,
        "norm_topk_prob": own.normalize,
        "routed_scaling_factor": own.scale,
        "n_group": own.groups,
        "topk_group": own.top_groups,
    }


def _parts(stack: StackConfig) -> Mapping[str, Pairs]:
    if "moe" not in stack.channels:
        return PARTS
    names, count = (None, "up_proj", "down_proj"), stack.channels["moe"]["experts"]
    moe = (
        *norm("norm", "channel_norm"),
        *experts("mixer.gate", "mixer.experts.{}", names, count),
        same("mixer.gate.e_score_correction_bias", "channel/bias"),
        *linear("mixer.fc1_latent_proj", "channel/into"),
        *linear("mixer.fc2_latent_proj", "channel/out"),
        *linear("mixer.shared_experts.up_proj", "channel/shared/up"),
        *linear("mixer.shared_experts.down_proj", "channel/shared/down"),
    )
    return {**PARTS, "moe": moe}


NEMOTRON_H = Family(
    "NemotronHForCausalLM",
    "nemotron_h",
    read=read,
    write=write,
    outer=(
        same("backbone.embeddings.weight", "embedding/table"),
        *norm("backbone.norm_f", "norm"),
        transposed("lm_head.weight", "head/kernel"),
    ),
    layer="backbone.layers.{}.",
    parts=_parts,
    base="backbone.",
    numbers=numbers,
)
