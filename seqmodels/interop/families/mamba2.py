"""Mamba-2."""

import math
from collections.abc import Mapping
from typing import Any

from seqmodels.interop.families.llama import layer_of
from seqmodels.interop.families.mamba import OUTER, read_stack, write_stack
from seqmodels.interop.family import Family, Pairs, convolution, linear, norm, same
from seqmodels.interop.options import Options

# Options of the mixer in a hybrid; how long chunks are changes no output.
INNER = (
    "mamba_chunk_size",
    "mamba_conv_bias",
    "mamba_d_conv",
    "mamba_d_head",
    "mamba_d_state",
    "mamba_expand",
    "mamba_n_groups",
    "mamba_n_heads",
    "mamba_proj_bias",
    "time_step_limit",
)
INFINITY = {"__float__": "Infinity"}


def mixer(where: str) -> Pairs:
    """Returns the pairs of a mixer whose names begin with `where`."""
    return (
        *linear(f"{where}.in_proj", "mixer/input"),
        *convolution(f"{where}.conv1d", "mixer/convolution"),
        same(f"{where}.dt_bias", "mixer/dt_bias"),
        same(f"{where}.A_log", "mixer/log_a"),
        same(f"{where}.D", "mixer/d"),
        same(f"{where}.norm.weight", "mixer/scale"),
        *linear(f"{where}.out_proj", "mixer/output"),
    )


def read_limits(options: Options) -> tuple[float, float]:
    """Returns the bounds of step sizes."""
    limits = options.take("time_step_limit", None) or (0.0, INFINITY)
    low, high = (math.inf if limit == INFINITY else float(limit) for limit in limits)
    return low, high


def write_limits(limits: tuple[float, float]) -> list[Any]:
    """Returns the option that `read_limits` reads."""
    return [INFINITY if limit == math.inf else limit for limit in limits]


def read_inner(options: Options, epsilon: float, *, used: bool) -> dict[str, Any]:
    """Returns the options of the mixer in a hybrid, which are named mamba_*; of one without the mixer they are empty."""
    options.ignore(*INNER)
    if not used:
        return {}
    expand, heads = options.take("mamba_expand", 2), options.take("mamba_n_heads", 128)
    channels, size = expand * options.take("hidden_size"), options.take("mamba_d_head", "auto")
    own = {
        "state_size": options.take("mamba_d_state", 256),
        "expand": expand,
        "head_dim": channels // heads if size == "auto" else size,
        "groups": options.take("mamba_n_groups", 1),
        "taps": options.take("mamba_d_conv", 4),
        "conv_bias": options.take("mamba_conv_bias", True),
        "bias": options.take("mamba_proj_bias", False),
        "dt_limit": read_limits(options),
        "epsilon": epsilon,
    }
    if heads * own["head_dim"] != channels:
        options.refuse(
            "mamba_n_heads",
            heads,
            f"mamba_expand * hidden_size / mamba_d_head = {channels / own['head_dim']:g}",
        )
    return own


def write_inner(mixers: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that `read_inner` reads, if there is such a mixer."""
    if "mamba2" not in mixers:
        return {}
    own = mixers["mamba2"].config
    return {
        "mamba_d_state": own.state_size,
        "mamba_expand": own.expand,
        "mamba_d_head": own.head_dim,
        "mamba_n_heads": own.heads,
        "mamba_n_groups": own.groups,
        "mamba_d_conv": own.taps,
        "mamba_conv_bias": own.conv_bias,
        "mamba_proj_bias": own.bias,
        "time_step_limit": write_limits(own.dt_limit),
    }


def read(options: Options) -> dict[str, Any]:
    """Returns our config."""
    options.ignore("chunk_size", "time_step_rank")
    options.only("rms_norm", True)
    heads, size = options.take("num_heads"), options.take("head_dim")
    epsilon = options.take("layer_norm_epsilon", 1e-5)
    own = {
        "head_dim": size,
        "groups": options.take("n_groups", 1),
        "dt_limit": read_limits(options),
        "epsilon": epsilon,
    }
    made = read_stack(options, "mamba2", own, tied=False)
    if heads * size != own["expand"] * made["width"]:
        options.refuse(
            "num_heads", heads, f"expand * hidden_size / head_dim = {own['expand'] * made['width'] // size}"
        )
    return made


def write(model: Any) -> dict[str, Any]:
    """Returns their options."""
    own = layer_of(model, 0).mixer.config
    return write_stack(model) | {
        "head_dim": own.head_dim,
        "num_heads": own.heads,
        "n_groups": own.groups,
        "time_step_limit": write_limits(own.dt_limit),
    }


MAMBA2 = Family(
    "Mamba2ForCausalLM",
    "mamba2",
    read=read,
    write=write,
    outer=OUTER,
    layer="backbone.layers.{}.",
    parts=lambda _: {"": norm("norm", "mixer_norm"), "mamba2": mixer("mixer")},
    base="backbone.",
)
