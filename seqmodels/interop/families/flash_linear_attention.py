"""GLA, DeltaNet, Gated DeltaNet and KDA in the format of flash-linear-attention: one mixer and gated linear units."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from seqmodels.config import StackConfig
from seqmodels.interop.families.kimi_linear import units
from seqmodels.interop.families.llama import layer_of
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
from seqmodels.interop.options import THEIR_ACTIVATIONS, Options

# What code runs, and what only training or other options of theirs need.
WITHOUT_EFFECT = (
    "attn_mode",
    "chunk_size_feed_forward",
    "fuse_cross_entropy",
    "fuse_linear_cross_entropy",
    "fuse_norm",
    "fuse_swiglu",
    "is_encoder_decoder",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "use_l2warp",
)
GATE_RANK = 16


def _read(options: Options, *, mixer: str, own: Callable[[Options, int], dict[str, Any]]) -> dict[str, Any]:
    options.ignore(*WITHOUT_EFFECT)
    options.only("attn", None)
    options.only("attnres_block_size", None)
    options.only("elementwise_affine", True)
    width, epsilon = options.take("hidden_size"), options.take("norm_eps", 1e-6)
    hidden, ratio = options.take("intermediate_size", None), options.take("hidden_ratio", 4) or 4
    if hidden is None:
        hidden = -(-int(width * ratio * 2 / 3) // 256) * 256
    return {
        "vocab_size": options.take("vocab_size"),
        "width": width,
        "depth": options.take("num_hidden_layers"),
        "pattern": (mixer,),
        "mixers": {mixer: {"epsilon": epsilon} | own(options, width)},
        "channel": "swiglu",
        "channels": {"swiglu": {"hidden": hidden, "activation": options.activation("hidden_act", "swish")}},
        "norm": "rms_norm",
        "norm_options": {"epsilon": epsilon},
        "tie_embeddings": options.take("tie_word_embeddings", False),
    }


def _write(model: Any, *, own: Callable[[Any, int], dict[str, Any]]) -> dict[str, Any]:
    config, block = model.config, layer_of(model, 0)
    activation = THEIR_ACTIVATIONS[block.channel.config.activation or "silu"]
    return {
        "vocab_size": config.input.vocab_size,
        "hidden_size": config.stack.width,
        "num_hidden_layers": config.stack.depth,
        "norm_eps": model.norm.config.epsilon,
        "intermediate_size": block.channel.up.kernel.shape[-1],
        "hidden_act": "swish" if activation == "silu" else activation,
        "tie_word_embeddings": config.tie_embeddings,
    } | own(block.mixer.config, config.stack.width)


def sizes(options: Options, width: int, heads: int, keys: float, values: float = 1.0) -> dict[str, int]:
    """Returns the sizes of keys and values that two factors on the width give, whose defaults are `keys` and `values`."""
    both = options.take("expand_k", keys), options.take("expand_v", values)
    key, value = (int(width * factor) // heads for factor in both)
    return {"heads": heads, "key_dim": key, "value_dim": value}


def factors(own: Any, width: int) -> dict[str, float]:
    """Returns the options that `sizes` reads."""
    key, value = own.sizes
    return {
        "expand_k": own.heads * key / width,
        "expand_v": own.heads * value / width,
        "num_heads": own.heads,
    }


def _read_gla(options: Options, width: int) -> dict[str, Any]:
    for name, value in (("use_output_gate", True), ("use_gk", True), ("use_gv", False)):
        options.only(name, value)
    for name in ("feature_map", "clamp_min"):
        options.only(name, None)
    heads, taps = options.take("num_heads", 4), options.take("conv_size", 4)
    return sizes(options, width, heads, 0.5) | {
        "kv_heads": options.take("num_kv_heads", None) or heads,
        "taps": taps if options.take("use_short_conv", False) else None,
        "gate_rank": GATE_RANK,
    }


def _write_gla(own: Any, width: int) -> dict[str, Any]:
    made = factors(own, width) | {"num_kv_heads": own.groups, "use_short_conv": own.taps is not None}
    made["fuse_norm"] = False  # The norm has another name if it is computed with the gate.
    return made if own.taps is None else made | {"conv_size": own.taps}


def _read_delta_net(options: Options, width: int) -> dict[str, Any]:
    for name in ("use_short_conv", "use_beta", "use_output_norm"):
        options.only(name, True)
    options.only("qk_norm", "l2")
    options.only("qk_activation", "silu")
    return sizes(options, width, options.take("num_heads", 4), 1.0) | {
        "taps": options.take("conv_size", 4),
        "gate": options.take("use_gate", False),
        "negative_eigenvalues": options.take("allow_neg_eigval", False),
    }


def _write_delta_net(own: Any, width: int) -> dict[str, Any]:
    return factors(own, width) | {
        "conv_size": own.taps,
        "use_gate": own.gate,
        "allow_neg_eigval": own.negative_eigenvalues,
    }


def _read_shared_keys(options: Options) -> dict[str, Any]:
    options.only("use_short_conv", True)
    heads = options.take("num_heads")
    return {
        "heads": heads,
        "value_heads": options.take("num_v_heads", None) or heads,
        "taps": options.take("conv_size", 4),
        "negative_eigenvalues": options.take("allow_neg_eigval", False),
    }


def _write_shared_keys(own: Any, _: int) -> dict[str, Any]:
    key, value = own.sizes
    return {
        "head_dim": key,
        "expand_v": value / key,
        "num_heads": own.heads,
        "num_v_heads": own.outputs,
        "conv_size": own.taps,
        "allow_neg_eigval": own.negative_eigenvalues,
    }


def _read_gated_deltanet(options: Options, _: int) -> dict[str, Any]:
    options.only("use_gate", True)
    options.only("output_gate_activation", "swish", "silu")
    size = options.take("head_dim", 256)
    own = {"key_dim": size, "value_dim": int(size * options.take("expand_v", 2.0))}
    return _read_shared_keys(options) | own


def _read_kda(options: Options, _: int) -> dict[str, Any]:
    options.only("expand_v", 1.0)
    options.only("safe_gate", False)
    options.only("lower_bound", None)
    return _read_shared_keys(options) | {"head_dim": options.take("head_dim", 128)}


def memory(own: Mapping[str, Any], key: int, value: int) -> Pairs:
    """Returns the pairs of the projections and convolutions of a delta rule."""
    sizes = (own["heads"] * key,) * 2 + (own.get("value_heads", own["heads"]) * value,)
    return (
        merged(tuple(f"attn.{name}_proj" for name in "qkv"), "mixer/memory/projection", sizes),
        merged_convolution(tuple(f"attn.{name}_conv1d" for name in "qkv"), "mixer/memory/convolution", sizes),
        *linear("attn.b_proj", "mixer/memory/strength"),
        *linear("attn.g_proj", "mixer/gate"),
        same("attn.o_norm.weight", "mixer/norm/scale"),
        *linear("attn.o_proj", "mixer/output"),
    )


def _gla(own: Mapping[str, Any]) -> Pairs:
    keys, values = own["kv_heads"] * own["key_dim"], own["kv_heads"] * own["value_dim"]
    convolutions = tuple(f"attn.{name}_conv1d" for name in "qkv")
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "g_proj": "gate", "o_proj": "output"}
    return (
        *(pair for theirs, ours in names.items() for pair in linear(f"attn.{theirs}", f"mixer/{ours}")),
        merged_convolution(convolutions, "mixer/convolution", (own["heads"] * own["key_dim"], keys, values)),
        *linear("attn.gk_proj.0", "mixer/decay/inner"),
        *linear("attn.gk_proj.1", "mixer/decay/outer"),
        same("attn.g_norm.weight", "mixer/norm/scale"),
    )


def _delta_net(own: Mapping[str, Any]) -> Pairs:
    return memory(own, own["key_dim"], own["value_dim"])


def _gated_deltanet(own: Mapping[str, Any]) -> Pairs:
    return (
        *memory(own, own["key_dim"], own["value_dim"]),
        *linear("attn.a_proj", "mixer/rate"),
        same("attn.A_log", "mixer/decay/log_rate"),
        same("attn.dt_bias", "mixer/decay/bias"),
    )


def _kda(own: Mapping[str, Any]) -> Pairs:
    size, heads = own["head_dim"], own["value_heads"]
    return (
        *memory(own, size, size),
        *linear("attn.f_proj.0", "mixer/rate/inner"),
        *linear("attn.f_proj.1", "mixer/rate/outer"),
        *linear("attn.g_proj.0", "mixer/gate/inner"),
        *linear("attn.g_proj.1", "mixer/gate/outer"),
        same("attn.A_log", "mixer/decay/log_rate"),
        reshaped("attn.dt_bias", "mixer/decay/bias", (heads * size,), (heads, size)),
    )


def family(
    architecture: str,
    model_type: str,
    mixer: str,
    read: Callable[[Options, int], dict[str, Any]],
    write: Callable[[Any, int], dict[str, Any]],
    pairs: Callable[[Mapping[str, Any]], Pairs],
    more: Callable[[StackConfig], Pairs] = lambda _: (),
) -> Family:
    """Returns a family of stacks of one mixer and gated linear units.

    Args:
      architecture, model_type: as in `Family`.
      mixer: our name of the mixer.
      read: function from their options and the width to the options of the mixer.
      write: its inverse, from the config of the mixer and the width.
      pairs: function from the options of the mixer to its pairs.
      more: as in `Family`.
    """

    def parts(stack: StackConfig) -> Mapping[str, Pairs]:
        return {
            "": (*norm("attn_norm", "mixer_norm"), *norm("mlp_norm", "channel_norm")),
            mixer: pairs(stack.mixers[mixer]),
            "swiglu": units("mlp", "channel"),
        }

    return Family(
        architecture,
        model_type,
        read=partial(_read, mixer=mixer, own=read),
        write=partial(_write, own=write),
        outer=(
            same("model.embeddings.weight", "embedding/table"),
            *norm("model.norm", "norm"),
            transposed("lm_head.weight", "head/kernel"),
        ),
        layer="model.layers.{}.",
        parts=parts,
        more=more,
        aliases=((r"\battn\.g_norm_swish_gate\.", "attn.g_norm."),),
    )


GLA = family("GLAForCausalLM", "gla", "gla", _read_gla, _write_gla, _gla)
DELTA_NET = family(
    "DeltaNetForCausalLM", "delta_net", "deltanet", _read_delta_net, _write_delta_net, _delta_net
)
GATED_DELTANET = family(
    "GatedDeltaNetForCausalLM",
    "gated_deltanet",
    "gated_deltanet",
    _read_gated_deltanet,
    _write_shared_keys,
    _gated_deltanet,
)
KDA = family("KDAForCausalLM", "kda", "kda", _read_kda, _write_shared_keys, _kda)
