"""Rotary positions in a published config.json: "rope_parameters", or "rope_theta" beside "rope_scaling"."""

import math
from collections.abc import Mapping
from typing import Any

from layers.positions import Rotary
from seqmodels.interop.options import Options

# Length of training that is written for models that have none.
UNKNOWN_LENGTH = 4096
TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
OLD_NAMES = {"su": "longrope"}


def read_rope(
    options: Options, *, base: float | None = None, fraction: float | None = None, partial: bool = False
) -> dict[str, Any]:
    """Returns our option `position` of attention for the rotary positions of a config.

    Args:
      base, fraction: values where the config states none under these names.
      partial: whether the architecture can turn a part of the features alone; the others turn all of them, whatever a
        "partial_rotary_factor" says, which is refused for them.
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
    return rope_from(options, merged, options.take("max_position_embeddings", None), partial=partial)


def rope_from(
    options: Options, parameters: Mapping[str, Any], longest: int | None = None, *, partial: bool = False
) -> dict[str, Any]:
    """Returns our option `position` for one set of parameters.

    "dynamic" and "longrope" depend on the number of tokens, which `options` states: up to the length of training, angles are
    those of training, and beyond it all tokens have the angles of the whole length.

    Args:
      longest: "max_position_embeddings".
      partial: as for `read_rope`.
    """
    left = dict(parameters)

    def need(name: str) -> Any:
        if left.get(name) is None:
            options.refuse(f"rope_parameters.{name}", None, f"a number, which rope_type={kind!r} needs")
        return left.pop(name)

    kind = left.pop("rope_type", left.pop("type", "default")) or "default"
    kind = OLD_NAMES.get(kind, kind)
    left.pop("type", None)
    if kind not in TYPES:
        options.refuse("rope_type", kind, f"one of {', '.join(TYPES)}")
    made = {"name": "rope", "base": float(left.pop("rope_theta", 10_000.0))}
    made["fraction"] = float(left.pop("partial_rotary_factor", 1.0))
    if made["fraction"] != 1 and not partial:
        options.refuse(
            "partial_rotary_factor", made["fraction"], "1, since this architecture turns all features"
        )
    outside = options.take("original_max_position_embeddings", None)
    trained = left.pop("original_max_position_embeddings", None) or outside or longest
    if kind in ("linear", "yarn", "llama3"):
        made |= {"scaling": kind, "factor": float(need("factor"))}
    if kind in ("yarn", "llama3"):
        made["length"] = trained
    if kind == "llama3":
        made |= {"slow": float(need("low_freq_factor")), "fast": float(need("high_freq_factor"))}
    if kind == "yarn":
        made |= {
            "slow": float(left.pop("beta_slow", None) or 1),
            "fast": float(left.pop("beta_fast", None) or 32),
            "rounded": bool(left.pop("truncate", True)),
        }
        made["amplitude"] = left.pop("attention_factor", None)
    if kind == "dynamic":
        made["base"] *= _raised(options, float(need("factor")), made["fraction"], longest)
    if kind == "longrope":
        chosen = {True: need("long_factor"), False: need("short_factor")}
        made |= {"scaling": kind, "divisors": tuple(map(float, chosen[(options.length or 0) > trained]))}
        factor, amplitude = left.pop("factor", None) or longest / trained, left.pop("attention_factor", None)
        found = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
        made["amplitude"] = found if amplitude is None else float(amplitude)
    for name, value in left.items():
        if value is not None:
            options.refuse(f"rope_parameters.{name}", value, "it to be left out")
    return made


def _raised(options: Options, factor: float, fraction: float, longest: int) -> float:
    """Returns the factor of "dynamic" on the base."""
    if (options.length or 0) <= longest:
        return 1.0
    size = options.take("head_dim", None) or options.take("hidden_size") // options.take(
        "num_attention_heads"
    )
    turned = int(size * fraction)
    return (factor * options.length / longest - (factor - 1)) ** (turned / (turned - 2))


def write_rope(rope: Rotary) -> dict[str, Any]:
    """Returns "rope_parameters" for our option `position`."""
    made: dict[str, Any] = {
        "rope_type": rope.scaling if rope.scaling in TYPES else "default",
        "rope_theta": rope.base,
    }
    if rope.fraction != 1:
        made["partial_rotary_factor"] = rope.fraction
    if rope.scaling in ("linear", "yarn", "llama3"):
        made["factor"] = rope.factor
    if rope.length is not None:
        made["original_max_position_embeddings"] = rope.length
    if rope.scaling == "llama3":
        made |= {"low_freq_factor": rope.slow, "high_freq_factor": rope.fast}
    if rope.scaling == "yarn":
        made |= {"beta_slow": rope.slow, "beta_fast": rope.fast, "truncate": rope.rounded}
        if rope.amplitude is not None:
            made["attention_factor"] = rope.amplitude
    if rope.scaling == "longrope":
        made |= {"short_factor": list(rope.divisors), "long_factor": list(rope.divisors)}
        made |= {"attention_factor": rope.gain, "original_max_position_embeddings": UNKNOWN_LENGTH}
    return made
