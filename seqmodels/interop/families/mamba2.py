"""Mamba-2."""

import math
from typing import Any

from seqmodels.interop.families.llama import layer_of
from seqmodels.interop.families.mamba import OUTER, read_stack, write_stack
from seqmodels.interop.family import Family, convolution, linear, norm, same
from seqmodels.interop.options import Options

INFINITY = {"__float__": "Infinity"}
MIXER = (
    *linear("mixer.in_proj", "mixer/input"),
    *convolution("mixer.conv1d", "mixer/convolution"),
    same("mixer.dt_bias", "mixer/dt_bias"),
    same("mixer.A_log", "mixer/log_a"),
    same("mixer.D", "mixer/d"),
    same("mixer.norm.weight", "mixer/scale"),
    *linear("mixer.out_proj", "mixer/output"),
)


def read(options: Options) -> dict[str, Any]:
    """Returns our config."""
    options.ignore("chunk_size", "time_step_rank")
    options.only("rms_norm", True)
    heads, size = options.take("num_heads"), options.take("head_dim")
    epsilon = options.take("layer_norm_epsilon", 1e-5)
    limits = options.take("time_step_limit", (0.0, INFINITY))
    low, high = (math.inf if limit == INFINITY else float(limit) for limit in limits)
    own = {
        "head_dim": size,
        "groups": options.take("n_groups", 1),
        "dt_limit": (low, high),
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
        "time_step_limit": [INFINITY if limit == math.inf else limit for limit in own.dt_limit],
    }


MAMBA2 = Family(
    "Mamba2ForCausalLM",
    "mamba2",
    read=read,
    write=write,
    outer=OUTER,
    layer="backbone.layers.{}.",
    parts=lambda _: {"": norm("norm", "mixer_norm"), "mamba2": MIXER},
    base="backbone.",
)
