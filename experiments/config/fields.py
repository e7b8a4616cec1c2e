"""The fields of a config by their paths: their names, their types, and the conversion of text to values.

A path such as "model.mixers.s5.state_size" names a field of the section's dataclass, an option of the mixer, channel mixer,
norm, position or task that the config chooses, or a key that the config file sets.
"""

import ast
import dataclasses
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from experiments.config.loading import DataConfig, MeshConfig, TrainConfig
from experiments.tasks import TASKS
from experiments.training.distillation import DistillConfig
from experiments.training.optimizers import OptimizerConfig
from layers.channel import CHANNEL_MIXERS
from layers.mixers import MIXERS
from layers.norms import NORMS
from layers.positions.position import POSITIONS
from layers.registry import suggestion
from seqmodels.adapters import LoraConfig
from seqmodels.config import KINDS, InputConfig, StackConfig

Place = tuple[str, ...]
MAPPING = Mapping[str, Any]
NAMED_IN_PATTERN = {("model", "mixers"): MIXERS, ("model", "channels"): CHANNEL_MIXERS}
SECTION_CLASSES = {"optimizer": OptimizerConfig, "train": TrainConfig, "data": DataConfig, "mesh": MeshConfig}


class FieldError(ValueError):
    """A path that names no field, or text that is no value of the field."""


class Field(NamedTuple):
    """A field: the annotation of its type, and its default (None if it has none)."""

    type: Any
    default: Any = None


def set_field(config: dict[str, Any], path: str, text: str) -> None:
    """Sets the field at `path` of a plain config to the value of `text`; missing mappings are created.

    Args:
      path: names separated by dots, without "config".
      text: value of the field's type as text. "none" is None where the field may be None; a tuple is written "(3, 8)" or
        "3,8", a mapping as in Python.

    Raises:
      FieldError: there is no such field (with the nearest name), or the text is no value of it.
    """
    place: Place = ()
    field, values = Field(MAPPING), config
    *parents, last = path.split(".")
    for name in parents:
        field = _field(config, place, field, values, name)
        place = (*place, name)
        values[name] = _opened(field, values.get(name), place)
        values = values[name]
    field = _field(config, place, field, values, last)
    try:
        values[last] = read(field.type, text)
    except ValueError as error:
        raise FieldError(f"config.{path}={text!r}; {error}") from None


def _field(config: MAPPING, place: Place, field: Field, values: MAPPING, name: str) -> Field:
    """Returns the field `name` of the mapping at `place`, which is `field` and holds `values`."""
    known = _fields(config, place, field, values)
    if known is None:
        arguments = typing.get_args(field.type)
        return Field(arguments[1] if len(arguments) == 2 else Any)
    if name in known:
        return known[name]
    if name in values:
        return Field(Any if values[name] is None else _type_of(values[name]), values[name])
    names = [*known, *(key for key in values if key not in known)]
    # A name in the pattern may be the typing mistake itself.
    usable = NAMED_IN_PATTERN[place].keys() | values.keys() if place in NAMED_IN_PATTERN else names
    hint = (
        suggestion(name, [one for one in names if one in usable]) or f"; fields: {', '.join(names) or 'none'}"
    )
    raise FieldError(f"{'.'.join(['config', *place])} has no field {name!r}{hint}")


def _type_of(value: Any) -> Any:
    return (
        MAPPING
        if isinstance(value, Mapping)
        else tuple[Any, ...]
        if isinstance(value, tuple)
        else type(value)
    )


def _opened(field: Field, value: Any, place: Place) -> dict[str, Any]:
    """Returns the mapping that holds the fields below `field`: its value, created if it is absent."""
    if isinstance(value, Mapping):
        return dict(value)
    if _is_position(field):
        return {"name": field.default if value is None else value}
    kinds = {field.type, *typing.get_args(field.type)}
    if value is None and any(kind is Any or typing.get_origin(kind) is Mapping for kind in kinds):
        return {}
    raise FieldError(f"{'.'.join(['config', *place])} has no fields of its own")


def _is_position(field: Field) -> bool:
    return POSITIONS["rope"] in typing.get_args(field.type)


def _fields(config: MAPPING, place: Place, field: Field, values: MAPPING) -> dict[str, Field] | None:
    """Returns the fields that the mapping at `place` may have; None if any name is allowed."""
    model = config.get("model", {})
    match place:
        case ():
            return {"seed": Field(int)} | {
                name: Field(MAPPING) for name in ("task", "model", *SECTION_CLASSES)
            }
        case (section,) if section in SECTION_CLASSES:
            return fields_of(SECTION_CLASSES[section])
        case ("train", "lora"):
            return fields_of(LoraConfig)
        case ("train", "distill"):
            return fields_of(DistillConfig)
        case ("task",):
            return _task_fields(values)
        case ("model",):
            return _model_fields(values)
        case ("model", "mixers"):
            return {name: Field(MAPPING) for name in _used(model)}
        case ("model", "channels"):
            return {name: Field(MAPPING) for name in _used_channels(model)}
        case ("model", "mixers", name):
            return _options(MIXERS, values.get("mixer", name)) | {"mixer": Field(str)}
        case ("model", "channels", name):
            return _options(CHANNEL_MIXERS, values.get("channel", name)) | {"channel": Field(str)}
        case ("model", "mixers", _, "options"):
            inner = model["mixers"][place[2]].get("inner")
            return _options(MIXERS, inner) or None
        case ("model", "norm_options"):
            return _options(NORMS, model.get("norm", "rms_norm"))
        case ("model", "mixer_defaults"):
            return _default_fields(model)
    if _is_position(field):
        chosen = POSITIONS.get(values.get("name"))
        return (fields_of(chosen) if chosen else {}) | {"name": Field(str)}
    return None


def fields_of(config_class: type) -> dict[str, Field]:
    """Returns the fields of a dataclass by name."""
    hints = typing.get_type_hints(config_class)
    return {
        field.name: Field(hints[field.name], None if field.default is dataclasses.MISSING else field.default)
        for field in dataclasses.fields(config_class)
    }


def _task_fields(values: MAPPING) -> dict[str, Field]:
    task = TASKS.get(values.get("name"))
    if task is None:
        return {"name": Field(str)}
    hints = typing.get_type_hints(task.__init__)
    return {name: Field(hints.get(name, Any)) for name in inspect.signature(task).parameters} | {
        "name": Field(str)
    }


def _model_fields(values: MAPPING) -> dict[str, Field]:
    kind = KINDS.get(values.get("kind"))
    own = {n: f for n, f in fields_of(kind).items() if n not in ("input", "stack")} if kind else {}
    return {"kind": Field(str)} | fields_of(InputConfig) | fields_of(StackConfig) | own


def _used(model: MAPPING) -> list[str]:
    return list(dict.fromkeys(entry.partition("+")[0] for entry in model.get("pattern", ())))


def _used_channels(model: MAPPING) -> list[str]:
    default = model.get("channel", StackConfig.channel)
    return list(dict.fromkeys(entry.partition("+")[2] or default for entry in model.get("pattern", ())))


def _options(registry: Mapping[str, tuple[type, type]], name: str | None) -> dict[str, Field]:
    return fields_of(registry[name][0]) if name in registry else {}


def _default_fields(model: MAPPING) -> dict[str, Field]:
    """Returns the options of all mixers; if types differ, that of the first mixer in the pattern applies."""
    mixers = model.get("mixers", {})
    used = [mixers.get(name, {}).get("mixer", name) for name in _used(model)]
    found: dict[str, Field] = {}
    for name in (*used, *MIXERS):
        found = _options(MIXERS, name) | found
    return found


def read(kind: Any, text: str) -> Any:
    """Returns the value of type `kind`, an annotation, that `text` stands for.

    Raises:
      ValueError: the text is no such value; names what is expected.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is str:
        return text
    if kind is Any:
        return _literal(text)
    if kind is bool:
        return _choice({"true": True, "1": True, "false": False, "0": False}, text.lower(), "true or false")
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise ValueError("expected an integer" if kind is int else "expected a number") from None
    if kind is types.NoneType:
        return _choice({"none": None}, text.lower(), "none")
    if origin is Literal:
        return _choice(
            {str(value): value for value in arguments}, text, f"one of {', '.join(map(str, arguments))}"
        )
    if origin in (typing.Union, types.UnionType):
        return _read_union(arguments, text)
    if origin is tuple:
        return _read_tuple(arguments, text)
    value = _literal(text)
    if origin is Mapping and isinstance(value, dict):
        return value
    raise ValueError("expected a dict" if origin is Mapping else "it cannot be set as a whole")


def _choice(values: Mapping[str, Any], text: str, expected: str) -> Any:
    if text not in values:
        raise ValueError(f"expected {expected}{suggestion(text, values)}")
    return values[text]


def _read_union(kinds: Sequence[Any], text: str) -> Any:
    """Returns the value of the first type that accepts the text; a string, which accepts any text, comes last."""
    reasons = []
    for kind in sorted(kinds, key=lambda kind: (kind is str, kind is not types.NoneType)):
        try:
            return read(kind, text)
        except ValueError as reason:
            reasons.append(str(reason).removeprefix("expected "))
    raise ValueError(f"expected {' or '.join(reasons[1:] + reasons[:1])}")


def _read_tuple(kinds: Sequence[Any], text: str) -> tuple[Any, ...]:
    value = _literal(text)
    if isinstance(value, str):
        value = [item.strip() for item in value.strip("()").split(",") if item.strip()]
    items = list(value) if isinstance(value, tuple | list) else [value]
    if kinds[-1] is not Ellipsis and len(items) != len(kinds):
        raise ValueError(f"expected {len(kinds)} values")
    each = [kinds[0]] * len(items) if kinds[-1] is Ellipsis else kinds
    return tuple(read(kind, str(item)) for kind, item in zip(each, items, strict=True))


def _literal(text: str) -> Any:
    """Returns the Python literal in the text, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)
