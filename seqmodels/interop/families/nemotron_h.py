"""Nemotron-H: Mamba-2 and attention without positions, with multilayer perceptrons after some of them."""

from collections.abc import Sequence
from typing import Any

from seqmodels.config import StackConfig
from seqmodels.interop.families.llama import layer_of, mixers_of, read_heads, shortest, write_heads
from seqmodels.interop.families.mamba2 import mixer, read_limits, write_limits
from seqmodels.interop.family import Family, linear, norm, same, transposed
from seqmodels.interop.options import THEIR_ACTIVATIONS, Options

# Each layer of theirs is a mixer or a perceptron; a layer of ours is a mixer, and a perceptron if one follows.
LETTERS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
KINDS = {
    "mamba": "mamba2",
    "linear_attention": "mamba2",
    "attention": "attention",
    "full_attention": "attention",
}
THEIRS = {"mamba2": "linear_attention", "attention": "full_attention"}
# Initial values, which code runs, and experts, which a model without layers of them does not have.
WITHOUT_EFFECT = (
    "chunk_size",
    "expand",
    "mamba_ssm_cache_dtype",
    "moe_intermediate_size",
    "moe_latent_size",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_overlap",
    "mtp_layers_block_type",
    "n_group",
    "n_routed_experts",
    "n_shared_experts",
    "norm_topk_prob",
    "num_experts_per_tok",
    "num_logits_to_keep",
    "rescale_prenorm_residual",
    "residual_in_fp32",
    "routed_scaling_factor",
    "time_step_floor",
    "time_step_max",
    "time_step_min",
    "time_step_rank",
    "topk_group",
    "use_mamba_kernels",
)
PARTS = {
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
        "attention": read_heads(options) | {"position": "none"},
    }
    options.only("mamba_proj_bias", mixers["mamba2"]["bias"])
    channel = {
        "hidden": options.take("intermediate_size"),
        "activation": options.activation("mlp_hidden_act", "relu2"),
        "bias": options.take("mlp_bias", False),
    }
    made = {
        "vocab_size": options.take("vocab_size"),
        "width": options.take("hidden_size"),
        "depth": len(pattern),
        "pattern": shortest(pattern),
        "mixers": {name: own for name, own in mixers.items() if any(name in each for each in pattern)},
        "channel": "none",
        "norm": "rms_norm",
        "norm_options": {"epsilon": epsilon},
        "tie_embeddings": options.take("tie_word_embeddings", False),
    }
    return made | {"channels": {"mlp": channel}} if any("mlp" in each for each in pattern) else made


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
        elif kind == "mlp" and place and kinds[place - 1] in KINDS:
            entries[-1] += "+mlp"
        else:
            options.refuse("layers_block_type", kind, f"{' or '.join(KINDS)}, or mlp after one of them")
    return entries


def numbers(stack: StackConfig) -> Sequence[tuple[int, int]]:
    """Returns the numbers of their layers that hold the mixer and the perceptron of each of ours."""
    found, start = [], 0
    for layer in range(stack.depth):
        found.append((start, start + 1))
        start += 1 if stack.channel_of(layer) is None else 2
    return found


def write(model: Any) -> dict[str, Any]:
    """Returns their options."""
    config, (names, mixers) = model.config, mixers_of(model)
    layers = [layer_of(model, layer) for layer in range(config.stack.depth)]
    kinds = []
    for name, block in zip(names, layers, strict=True):
        kinds += [THEIRS[name]] if block.channel is None else [THEIRS[name], "mlp"]
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
    channel = next(block.channel for block in layers if block.channel is not None)
    return made | {
        "intermediate_size": channel.up.kernel.shape[-1],
        "mlp_hidden_act": THEIR_ACTIVATIONS[channel.config.activation or "gelu"],
        "mlp_bias": channel.config.bias,
    }


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
    parts=lambda _: PARTS,
    base="backbone.",
    numbers=numbers,
)
