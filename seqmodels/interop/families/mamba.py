"""Mamba, and Falcon-Mamba, which normalizes step sizes, B and C."""

from functools import partial
from typing import Any

from seqmodels.interop.families.llama import layer_of
from seqmodels.interop.family import Family, convolution, linear, norm, same, transposed
from seqmodels.interop.options import Options

OUTER = (
    same("backbone.embeddings.weight", "embedding/table"),
    *norm("backbone.norm_f", "norm"),
    transposed("lm_head.weight", "head/kernel"),
)
# How step sizes start, how residuals are rounded, and which code runs.
WITHOUT_EFFECT = (
    "rescale_prenorm_residual",
    "residual_in_fp32",
    "time_step_floor",
    "time_step_init_scheme",
    "time_step_max",
    "time_step_min",
    "time_step_scale",
    "use_associative_scan",
    "use_mambapy",
)
MIXER = (
    *linear("mixer.in_proj", "mixer/input"),
    *convolution("mixer.conv1d", "mixer/convolution"),
    transposed("mixer.x_proj.weight", "mixer/selection/kernel"),
    transposed("mixer.dt_proj.weight", "mixer/dt/kernel"),
    same("mixer.dt_proj.bias", "mixer/dt_bias"),
    same("mixer.A_log", "mixer/log_a"),
    same("mixer.D", "mixer/d"),
    *linear("mixer.out_proj", "mixer/output"),
)


def read_stack(options: Options, mixer: str, own: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """Returns our config of a stack of one mixer without channel mixers."""
    options.ignore(*WITHOUT_EFFECT)
    options.only("hidden_act", "silu")
    own |= {
        "state_size": options.take("state_size"),
        "expand": options.take("expand", 2),
        "taps": options.take("conv_kernel", 4),
        "bias": options.take("use_bias", False),
        "conv_bias": options.take("use_conv_bias", True),
    }
    return {
        "vocab_size": options.take("vocab_size"),
        "width": options.take("hidden_size"),
        "depth": options.take("num_hidden_layers"),
        "pattern": (f"{mixer}+none",),
        "mixers": {mixer: own},
        "norm": "rms_norm",
        "norm_options": {"epsilon": options.take("layer_norm_epsilon", 1e-5)},
        "tie_embeddings": options.take("tie_word_embeddings", tied),
    }


def write_stack(model: Any) -> dict[str, Any]:
    """Returns the options that `read_stack` reads."""
    config, own = model.config, layer_of(model, 0).mixer.config
    return {
        "vocab_size": config.input.vocab_size,
        "hidden_size": config.stack.width,
        "num_hidden_layers": config.stack.depth,
        "state_size": own.state_size,
        "expand": own.expand,
        "conv_kernel": own.taps,
        "use_bias": own.bias,
        "use_conv_bias": own.conv_bias,
        "layer_norm_epsilon": model.norm.config.epsilon,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _read(options: Options, *, inner_norm: bool) -> dict[str, Any]:
    rank = options.take("time_step_rank", "auto")
    own: dict[str, Any] = {"dt_rank": None if rank == "auto" else rank}
    if inner_norm:
        own |= {"inner_norm": True, "epsilon": options.take("mixer_rms_eps", 1e-6)}
    made = read_stack(options, "mamba", own, tied=True)
    options.only("intermediate_size", own["expand"] * made["width"])
    return made


def _write(model: Any, *, inner_norm: bool) -> dict[str, Any]:
    own = layer_of(model, 0).mixer.config
    made = write_stack(model) | {"time_step_rank": own.rank, "intermediate_size": own.channels}
    return made | {"mixer_rms_eps": own.epsilon} if inner_norm else made


def _family(architecture: str, model_type: str, *, inner_norm: bool) -> Family:
    return Family(
        architecture,
        model_type,
        read=partial(_read, inner_norm=inner_norm),
        write=partial(_write, inner_norm=inner_norm),
        outer=OUTER,
        layer="backbone.layers.{}.",
        parts=lambda _: {"": norm("norm", "mixer_norm"), "mamba": MIXER},
        constants={f"mixer/inner_norms/{number}/scale": 1.0 for number in range(3)} if inner_norm else {},
        base="backbone.",
    )


MAMBA = _family("MambaForCausalLM", "mamba", inner_norm=False)
FALCON_MAMBA = _family("FalconMambaForCausalLM", "falcon_mamba", inner_norm=True)
