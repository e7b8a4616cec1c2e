"""Jamba: Mamba and attention without positions in turn, with experts in some layers."""

from collections.abc import Mapping
from typing import Any

from seqmodels.config import StackConfig
from seqmodels.interop.families.llama import (
    layer_of,
    read_heads,
    read_sizes,
    shortest,
    write_sizes,
)
from seqmodels.interop.families.mixtral import experts
from seqmodels.interop.family import Family, Pairs, convolution, linear, norm, same, transposed
from seqmodels.interop.options import Options

MAMBA = (
    *linear("mamba.in_proj", "mixer/input"),
    *convolution("mamba.conv1d", "mixer/convolution"),
    transposed("mamba.x_proj.weight", "mixer/selection/kernel"),
    transposed("mamba.dt_proj.weight", "mixer/dt/kernel"),
    same("mamba.dt_proj.bias", "mixer/dt_bias"),
    same("mamba.A_log", "mixer/log_a"),
    same("mamba.D", "mixer/d"),
    *linear("mamba.out_proj", "mixer/output"),
    *(
        same(f"mamba.{name}_layernorm.weight", f"mixer/inner_norms/{place}/scale")
        for place, name in enumerate(("dt", "b", "c"))
    ),
)
ATTENTION = (
    *linear("self_attn.q_proj", "mixer/query"),
    *linear("self_attn.k_proj", "mixer/key"),
    *linear("self_attn.v_proj", "mixer/value"),
    *linear("self_attn.o_proj", "mixer/output"),
)
GLU = (
    *linear("feed_forward.gate_proj", "channel/gate"),
    *linear("feed_forward.up_proj", "channel/up"),
    *linear("feed_forward.down_proj", "channel/down"),
)


def read(options: Options) -> dict[str, Any]:
    """Returns our config."""
    options.ignore("use_mamba_kernels", "num_logits_to_keep", "use_associative_scan", "use_mambapy")
    options.only("hidden_act", "silu")
    options.only("sliding_window", None)
    sizes = read_sizes(options)
    epsilon, depth = sizes["norm_options"]["epsilon"], sizes["depth"]
    attention = read_heads(options) | {"position": "none"}
    rank = options.take("mamba_dt_rank", "auto")
    mamba = {
        "state_size": options.take("mamba_d_state", 16),
        "taps": options.take("mamba_d_conv", 4),
        "expand": options.take("mamba_expand", 2),
        "dt_rank": None if rank == "auto" else rank,
        "conv_bias": options.take("mamba_conv_bias", True),
        "bias": options.take("mamba_proj_bias", False),
        "inner_norm": True,
        "epsilon": epsilon,
    }
    hidden, count = options.take("intermediate_size"), options.take("num_experts", 16)
    moe = {
        "experts": count,
        "top_k": options.take("num_experts_per_tok", 2),
        "hidden": hidden,
        "normalize": False,
    }
    at = [_places(options, kind, depth) for kind in ("attn", "expert")]
    kinds = [
        f"{'attention' if at[0][layer] else 'mamba'}+{'moe' if at[1][layer] and count > 1 else 'swiglu'}"
        for layer in range(depth)
    ]
    mixers, channels = {"attention": attention, "mamba": mamba}, {"swiglu": {"hidden": hidden}, "moe": moe}
    names = [kind.split("+") for kind in kinds]
    return sizes | {
        "pattern": shortest(kinds),
        "mixers": {name: mixers[name] for name, _ in names},
        "channels": {name: channels[name] for _, name in names},
    }


def _places(options: Options, kind: str, depth: int) -> list[bool]:
    """Returns which layers are of a kind that comes back after a period."""
    defaults = {"attn": (8, 4), "expert": (2, 1)}[kind]
    period = options.take(f"{kind}_layer_period", defaults[0])
    offset = options.take(f"{kind}_layer_offset", defaults[1])
    return [layer % period == offset for layer in range(depth)]


def write(model: Any) -> dict[str, Any]:
    """Returns their options."""
    stack = model.config.stack
    blocks = [layer_of(model, layer) for layer in range(stack.depth)]
    attention = [stack.mixer_of(layer)[0] == "attention" for layer in range(stack.depth)]
    moe = [stack.channel_of(layer)[0] == "moe" for layer in range(stack.depth)]
    heads = blocks[attention.index(True)].mixer.config
    mamba = blocks[attention.index(False)].mixer.config
    channel = blocks[0].channel
    made = write_sizes(model) | {
        "num_attention_heads": heads.heads,
        "num_key_value_heads": heads.groups,
        "hidden_act": "silu",
        "mamba_d_state": mamba.state_size,
        "mamba_d_conv": mamba.taps,
        "mamba_expand": mamba.expand,
        "mamba_dt_rank": mamba.rank,
        "mamba_conv_bias": mamba.conv_bias,
        "mamba_proj_bias": mamba.bias,
        "intermediate_size": (channel.up if moe[0] else channel.up.kernel).shape[-1],
        "num_experts": 1,
    }
    made |= _period("attn", attention)
    if True in moe:
        experts = blocks[moe.index(True)].channel.config
        made |= {"num_experts": experts.experts, "num_experts_per_tok": experts.top_k} | _period(
            "expert", moe
        )
    return made


def _period(kind: str, places: list[bool]) -> dict[str, int]:
    pattern = shortest(places)
    first = pattern.index(True)
    # A lone place in a period, or its second occurrence tells the period.
    period = next((later - first for later in range(first + 1, len(places)) if places[later]), len(places))
    return {f"{kind}_layer_period": period, f"{kind}_layer_offset": first}


def parts(stack: StackConfig) -> Mapping[str, Pairs]:
    """Returns the pairs within a layer."""
    names = ("gate_proj", "up_proj", "down_proj")
    count = stack.channels.get("moe", {}).get("experts", 0)
    return {
        "": (*norm("input_layernorm", "mixer_norm"), *norm("pre_ff_layernorm", "channel_norm")),
        "mamba": MAMBA,
        "attention": ATTENTION,
        "swiglu": GLU,
        "moe": experts("feed_forward.router", "feed_forward.experts.{}", names, count),
    }


JAMBA = Family(
    "JambaForCausalLM",
    "jamba",
    read=read,
    write=write,
    outer=(
        same("model.embed_tokens.weight", "embedding/table"),
        *norm("model.final_layernorm", "norm"),
        transposed("lm_head.weight", "head/kernel"),
    ),
    layer="model.layers.{}.",
    parts=parts,
)
