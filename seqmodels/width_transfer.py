"""muP: initial values and learning rates that carry over from a narrow model to a wide one (Yang et al. 2022, arXiv:2203.03466).

A model of the width d is compared with its base, the same model of the width `base_width`. Whether sizes of a parameter grow with the
width tells its kind; with n the inputs of a matrix and n_0 those of the base, for Adam:

    kind      grows with the width          initial variance     learning rate
    input     outputs alone, or a vector    as in the base       1
    hidden    inputs and outputs            1 / n                n_0 / n
    output    inputs alone                  n_0 / n^2            n_0 / n

A tied head is the embedding times d_0 / d. Hidden features, their changes and those of the logits then have sizes in which the width
does not appear. Weight decay times learning rate stays as it is. The rules are those of linear maps: B and C of a state space, low-rank
maps and gates are matrices like others, decays, step sizes, skips and short convolutions are vectors.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from flax import nnx

from layers.mixer import Mixer
from seqmodels.config import LanguageModelConfig, StackConfig

KINDS = ("language_model", "classifier", "regressor")
# Options of mixers and channel mixers that count what grows with the width.
COUNTS = ("heads", "kv_heads", "inner", "hidden")
# Parameters of more than one axis that are applied feature by feature.
BY_FEATURE = ("log_a", "positions", "types")


def logit_factor(config: LanguageModelConfig) -> float:
    """Returns the factor on the logits of a language model: `logit_scale`, with `base_width` also that of a tied head."""
    tied = config.tie_embeddings and config.stack.base_width is not None
    return config.logit_scale * (config.stack.base_width / config.stack.width if tied else 1.0)


def at_width(values: Mapping[str, Any], width: int) -> dict[str, Any]:
    """Returns what `build_model` makes the same model of another width of: options that count heads and channels follow it.

    Heads keep their size.

    Raises:
      ValueError: one of these options is no whole number at that width.
    """
    given = values["width"]

    def counted(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        found = dict(options)
        for key in COUNTS:
            if isinstance(value := found.get(key), int) and not isinstance(value, bool):
                if value * width % given:
                    raise ValueError(
                        f"{name}.{key}={value} at width={given} would be {value * width / given:g} at width={width}, as with base_width "
                        "heads keep their size; expected a number that is whole at both"
                    )
                found[key] = value * width // given
        return found

    sections = {
        name: {key: counted(f"{name}.{key}", options) for key, options in values.get(name, {}).items()}
        for name in ("mixers", "channels")
    }
    defaults = counted("mixer_defaults", values.get("mixer_defaults", {}))
    return {**values, **sections, "mixer_defaults": defaults, "width": width}


def transfer(model: nnx.Module, base: nnx.Module, config: StackConfig) -> None:
    """Sets initial values and learning rates of a model by the rules, in place.

    Args:
      model: the model as built.
      base: its base, with shapes in place of arrays.
      config: config of the stack of the model.

    Raises:
      ValueError: the size of a head grows with the width, or there is no rule for a parameter.
    """
    _check_heads(model, base)
    shapes = {path: variable.shape for path, variable in _parameters(base)}
    for path, variable in _parameters(model):
        kind, ratio = kind_of(path, variable.shape, shapes[path])
        if path[-2:] == ("embedding", "table"):
            # Drawn with the variance 1 / width unless it is given.
            if model.config.input.embedding_stddev is None:
                variable.set_value(variable[...] * (config.width / config.base_width) ** 0.5)
        elif kind == "output":
            variable.set_value(variable[...] * ratio**0.5)
        if kind != "input":
            variable.set_metadata(rate=ratio)


def kind_of(path: tuple[str | int, ...], shape: tuple[int, ...], base: tuple[int, ...]) -> tuple[str, float]:
    """Returns "input", "hidden" or "output", and n_0 / n for the inputs n of a matrix, 1 for a vector.

    Args:
      path: names of the parameter; matrices have their inputs in the second last axis.
      shape, base: its shape, and that in the base.

    Raises:
      ValueError: there is no rule for the parameter.
    """
    grows = [a != b for a, b in zip(shape, base, strict=True)]
    if path[-1] == "table" or path[-1] in BY_FEATURE or len(shape) < 2 or not any(grows):
        return "input", 1.0
    matrix = path[-1] == "kernel" and not any(grows[:-2])
    # A vector for each of several layers is stacked into two axes, of which the last one alone grows.
    if not matrix and any(grows[:-1]):
        raise ValueError(
            f"base_width is given, and {'/'.join(map(str, path))} {list(shape)}, {list(base)} in the base, is no matrix of a linear "
            "map, for which muP has rules; expected other mixers, such as attention, mamba2 or gla"
        )
    if not grows[-2]:
        return "input", 1.0
    return "hidden" if grows[-1] else "output", base[-2] / shape[-2]


def _check_heads(model: nnx.Module, base: nnx.Module) -> None:
    theirs = dict(_mixers(base))
    for path, mixer in _mixers(model):
        for name in ("size", "head_dim"):
            sizes = [getattr(each.config, name, None) for each in (mixer, theirs[path])]
            if sizes[0] != sizes[1]:
                raise ValueError(
                    f"base_width is given, and heads of {path} have {sizes[0]} features, {sizes[1]} in the base; expected a number of "
                    "heads that grows with the width"
                )


def _mixers(model: nnx.Module) -> Iterator[tuple[str, Mixer]]:
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Mixer) and dataclasses.is_dataclass(module.config):
            yield "/".join(map(str, path)), module


def _parameters(model: nnx.Module) -> Iterator[tuple[tuple[str | int, ...], nnx.Variable]]:
    yield from nnx.to_flat_state(nnx.state(model, nnx.Param))
