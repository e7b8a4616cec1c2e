"""Building a layer from a name and options, with errors that list the valid choices."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from layers.options import suggestion


def choose(kind: str, registry: Mapping[str, Any], name: str) -> Any:
    """Returns the entry called `name`, or raises a ValueError that lists the names and suggests the nearest."""
    if name in registry:
        return registry[name]
    raise ValueError(
        f"unknown {kind} {name!r}{suggestion(name, registry)}; available: {', '.join(sorted(registry))}"
    )


def make_config(
    kind: str, config_class: type, options: Mapping[str, Any], given: Mapping[str, Any] | None = None
) -> Any:
    """Returns the frozen dataclass `config_class` made from options, and from those of `given` that are fields of it.

    Fields in its class attribute `fixed` have one value only, such as `causal` of a pattern that looks back; `given` leaves them as they are.

    Raises:
      ValueError: an option is not a field, a required field is missing, or a value is impossible.
      TypeError: a value is of another kind than the annotation of its field.
    """
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for option in options:
        if option not in fields:
            raise ValueError(
                f"{kind} has no option {option!r}{suggestion(option, fields)}; options: {', '.join(fields)}"
            )
    fixed = getattr(config_class, "fixed", ())
    values = {k: v for k, v in (given or {}).items() if k in fields and k not in fixed}
    values.update(options)
    missing = [
        n
        for n, f in fields.items()
        if f.default is f.default_factory is dataclasses.MISSING and n not in values
    ]
    if missing:
        raise ValueError(f"{kind} needs the option{'s' if len(missing) > 1 else ''} {', '.join(missing)}")
    return config_class(**values)


def build(
    kind: str,
    registry: Mapping[str, tuple[type, type]],
    name: str,
    options: Mapping[str, Any],
    *,
    given: Mapping[str, Any],
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Returns the layer that a registry of (config class, module class) knows as `name`.

    Args:
      options: fields of the config, as the user wrote them.
      given: fields that the surrounding model supplies (width, dtype), used where the config has them.
    """
    config_class, module_class = choose(kind, registry, name)
    return module_class(make_config(f"{kind} {name!r}", config_class, options, given), rngs=rngs)
