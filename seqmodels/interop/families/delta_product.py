"""Gated DeltaProduct and Comba in the format of flash-linear-attention."""

from collections.abc import Mapping
from typing import Any

from seqmodels.interop.families.flash_linear_attention import family, memory
from seqmodels.interop.family import Pairs, linear, merged, merged_convolution, same
from seqmodels.interop.options import Options

DECAY = (
    *linear("attn.a_proj", "mixer/rate"),
    same("attn.A_log", "mixer/decay/log_rate"),
    same("attn.dt_bias", "mixer/decay/bias"),
)


def _read_sizes(options: Options) -> dict[str, Any]:
    options.only("use_short_conv", True)
    options.only("use_output_gate", True)
    size = options.take("head_dim", 256)
    return {
        "heads": options.take("num_heads", 6),
        "key_dim": size,
        "value_dim": int(size * options.take("expand_v", 2.0)),
        "taps": options.take("conv_size", 4),
    }


def _write_sizes(own: Any) -> dict[str, Any]:
    key, value = own.sizes
    return {"head_dim": key, "expand_v": value / key, "num_heads": own.heads, "conv_size": own.taps}


def _read_product(options: Options, _: int) -> dict[str, Any]:
    return _read_sizes(options) | {
        "householders": options.take("num_householder", 1),
        "decay": options.take("use_forget_gate", False),
        "negative_eigenvalues": options.take("allow_neg_eigval", False),
    }


def _write_product(own: Any, _: int) -> dict[str, Any]:
    return _write_sizes(own) | {
        "num_householder": own.householders,
        "use_forget_gate": own.decay,
        "allow_neg_eigval": own.negative_eigenvalues,
    }


def _product(own: Mapping[str, Any]) -> Pairs:
    keys, steps = own["heads"] * own["key_dim"], own["householders"]
    sizes = keys, steps * keys, steps * own["heads"] * own["value_dim"]
    return (
        merged(tuple(f"attn.{name}_proj" for name in "qkv"), "mixer/projection", sizes),
        merged_convolution(tuple(f"attn.{name}_conv1d" for name in "qkv"), "mixer/convolution", sizes),
        *linear("attn.b_proj", "mixer/strength"),
        *DECAY,
        *linear("attn.g_proj", "mixer/gate"),
        same("attn.o_norm.weight", "mixer/norm/scale"),
        *linear("attn.o_proj", "mixer/output"),
    )


def _read_comba(options: Options, _: int) -> dict[str, Any]:
    options.only("use_output_correction", True)
    options.only("use_inner_decay", True)
    heads = options.take("num_heads", 6)
    return _read_sizes(options) | {
        "value_heads": options.take("num_v_heads", None) or heads,
        "correction": float(options.take("correction_factor", 1.0)),
    }


def _write_comba(own: Any, _: int) -> dict[str, Any]:
    return _write_sizes(own) | {"num_v_heads": own.outputs, "correction_factor": own.correction}


def _comba(own: Mapping[str, Any]) -> Pairs:
    return (
        *memory(own, own["key_dim"], own["value_dim"]),
        *DECAY,
        same("attn.decay", "mixer/feedback"),
        same("attn.D", "mixer/correction"),
    )


GATED_DELTAPRODUCT = family(
    "GatedDeltaProductForCausalLM",
    "gated_deltaproduct",
    "gated_deltaproduct",
    _read_product,
    _write_product,
    _product,
)
COMBA = family("CombaForCausalLM", "comba", "comba", _read_comba, _write_comba, _comba)
