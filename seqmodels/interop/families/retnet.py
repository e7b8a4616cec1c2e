"""RetNet in the format of flash-linear-attention."""

from collections.abc import Mapping
from typing import Any

from seqmodels.interop.families.flash_linear_attention import factors, family, sizes
from seqmodels.interop.family import Pairs, linear, same
from seqmodels.interop.options import Options

# Their rotations are those of RoPE with this base.
BASE = 10_000.0


def _read(options: Options, width: int) -> dict[str, Any]:
    options.only("use_short_conv", False)
    options.only("use_output_gate", True)
    options.only("feature_map", None)
    options.ignore("conv_size")
    heads = options.take("num_heads", 8)
    own = sizes(options, width, heads, 1.0, 2.0)
    key = own["key_dim"]
    return own | {
        "kv_heads": options.take("num_kv_heads", None) or heads,
        "rope_base": BASE ** ((key - 2) / key) if key > 2 else BASE,
        "affine": True,
    }


def _write(own: Any, width: int) -> dict[str, Any]:
    # The norm has another name if it is computed with the gate.
    return factors(own, width) | {"num_kv_heads": own.groups, "fuse_norm": False}


def _pairs(_: Mapping[str, Any]) -> Pairs:
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "g_proj": "gate", "o_proj": "output"}
    maps = (pair for theirs, ours in names.items() for pair in linear(f"attn.{theirs}", f"mixer/{ours}"))
    return *maps, same("attn.g_norm.weight", "mixer/norm/scale")


RETNET = family("RetNetForCausalLM", "retnet", "retnet", _read, _write, _pairs)
