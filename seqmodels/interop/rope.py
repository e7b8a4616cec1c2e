"""Rotary positions in a published config.json: "rope_parameters", or "rope_theta" beside "rope_scaling"."""

from collections.abc import Mapping
from typing import Any

from layers.positions import Rotary
from seqmodels.interop.options import Options

TYPES = ("default", "linear", "yarn", "llama3")


def read_rope(
    options: Options, *, base: float | None = None, fraction: float | None = None
) -> dict[str, Any]:
    """Returns our option `position` of attention for the rotary positions of a config.

    Args:
      base, fraction: values where the config states none under these names.
    """
    given = options.take("rope_parameters", None)
    theta = options.take("rope_theta", base)
    scaling = options.take("rope_scaling", None)
    fraction = options.take("partial_rotary_factor", fraction)
    merged = {**(scaling or {}), **(given or {})}
    if theta is not None:
        merged.setdefault("rope_theta", theta)
    if fraction is not None:
        merged.setdefault("partial_rotary_factor", fraction)
    return rope_from(options, merged, options.take("max_position_embeddings", None))


def rope_from(options: Options, parameters: Mapping[str, Any], longest: int | None = None) -> dict[str, Any]:
    """Returns our option `position` for one set of parameters."""
    left = dict(parameters)
    kind = left.pop("rope_type", left.pop("type", "default")) or "default"
    left.pop("type", None)
    if kind not in TYPES:
        options.refuse("rope_type", kind, f"one of {', '.join(TYPES)}")
    made = {"name": "rope", "base": float(left.pop("rope_theta", 10_000.0))}
    made["fraction"] = float(left.pop("partial_rotary_factor", 1.0))
    if kind != "default":
        made |= {"scaling": kind, "factor": float(left.pop("factor"))}
    if kind in ("yarn", "llama3"):
        made["length"] = left.pop("original_max_position_embeddings", None) or longest
    if kind == "llama3":
        made |= {"slow": float(left.pop("low_freq_factor")), "fast": float(left.pop("high_freq_factor"))}
    if kind == "yarn":
        made |= {
            "slow": float(left.pop("beta_slow", None) or 1),
            "fast": float(left.pop("beta_fast", None) or 32),
        }
        made["amplitude"] = left.pop("attention_factor", None)
        if not left.pop("truncate", True):
            options.refuse("truncate", False, "True")
    left.pop("original_max_position_embeddings", None)
    for name, value in left.items():
        if value is not None:
            options.refuse(f"rope_parameters.{name}", value, "it to be left out")
    return made


def write_rope(rope: Rotary) -> dict[str, Any]:
    """Returns "rope_parameters" for our option `position`."""
    made: dict[str, Any] = {
        "rope_type": rope.scaling if rope.scaling in TYPES else "default",
        "rope_theta": rope.base,
    }
    if rope.fraction != 1:
        made["partial_rotary_factor"] = rope.fraction
    if rope.scaling != "none":
        made["factor"] = rope.factor
    if rope.length is not None:
        made["original_max_position_embeddings"] = rope.length
    if rope.scaling == "llama3":
        made |= {"low_freq_factor": rope.slow, "high_freq_factor": rope.fast}
    if rope.scaling == "yarn":
        made |= {"beta_slow": rope.slow, "beta_fast": rope.fast}
        if rope.amplitude is not None:
            made["attention_factor"] = rope.amplitude
    return made
