"""The Forgetting Transformer in the format of flash-linear-attention."""

from collections.abc import Mapping
from typing import Any

from seqmodels.interop.families.flash_linear_attention import family
from seqmodels.interop.family import Pairs, linear, same
from seqmodels.interop.options import Options

# Of the norms of queries and keys, whatever norm_eps is.
EPSILON = 1e-5


def _read(options: Options, width: int) -> dict[str, Any]:
    options.only("qkv_bias", False)
    options.only("window_size", None)
    heads, normed = options.take("num_heads", 32), options.take("qk_norm", False)
    if width % heads:
        options.refuse("num_heads", heads, f"a divisor of hidden_size={width}")
    return {
        "heads": heads,
        "kv_heads": options.take("num_kv_heads", None) or heads,
        "head_dim": width // heads,
        "qk_norm": normed,
        "norm_scales": "own" if normed else "shared",
        "gate": options.take("use_output_gate", False),
        "epsilon": EPSILON,
    }


def _write(own: Any, _: int) -> dict[str, Any]:
    return {
        "num_heads": own.heads,
        "num_kv_heads": own.groups,
        "qk_norm": own.qk_norm,
        "use_output_gate": own.gate,
    }


def _pairs(_: Mapping[str, Any]) -> Pairs:
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "f_proj": "forget", "g_proj": "gate"}
    names["o_proj"] = "output"
    maps = (pair for theirs, ours in names.items() for pair in linear(f"attn.{theirs}", f"mixer/{ours}"))
    norms = (same(f"attn.{each[0]}_norm.weight", f"mixer/{each}_norm/scale") for each in ("query", "key"))
    return *maps, *norms


FORGETTING_TRANSFORMER = family(
    "ForgettingTransformerForCausalLM",
    "forgetting_transformer",
    "forgetting_attention",
    _read,
    _write,
    _pairs,
)
