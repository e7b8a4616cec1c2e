"""Options: frozen dataclasses whose values are checked against their annotations before anything is computed.

    @checked_dataclass
    class AttentionConfig:
        heads: int = 8                     # a size: at least 1
        sink_tokens: Count = 0             # 0 too
        logit_cap: Positive | None = None
        causal: bool = True

An `int` is a size of at least 1 unless its annotation states another bound. An integer is a number, a bool is not. Numbers are
finite. None, names and mappings pass only where the annotation has them.
"""

import dataclasses
import difflib
import functools
import math
import numbers
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np

Mismatch = tuple[type[Exception], str]


@dataclasses.dataclass(frozen=True)
class Bound:
    """The numbers that an annotated field takes.

    Attributes:
      least, most: the smallest and the largest one.
      above, below: numbers that all of them are above and below.
      infinite: whether infinity is one of them.
    """

    least: int | float | None = None
    most: int | float | None = None
    above: int | float | None = None
    below: int | float | None = None
    infinite: bool = False

    def holds(self, value: Any) -> bool:
        """Returns whether a number lies within the bounds."""
        return bool(
            (math.isfinite(value) or (self.infinite and not math.isnan(value)))
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        limits = {"at least": self.least, "at most": self.most, "above": self.above, "below": self.below}
        stated = [f"{word} {limit:g}" for word, limit in limits.items() if limit is not None]
        return " and ".join(["of " + stated[0], *stated[1:]] if stated and stated[0][:2] == "at" else stated)


@dataclasses.dataclass(frozen=True)
class DtypeNames:
    """The dtypes that an annotated field takes, by name."""

    names: tuple[str, ...]


SIZE = Bound(least=1)
ITEMS = {str: "names", int: "integers", float: "numbers"}
Count = Annotated[int, Bound(least=0)]
Positive = Annotated[float, Bound(above=0)]
Infinite = Annotated[float, Bound(infinite=True)]
NonNegative = Annotated[float, Bound(least=0)]
Fraction = Annotated[float, Bound(least=0, below=1)]
UnitInterval = Annotated[float, Bound(least=0, most=1)]
ActivationDtype = Annotated[Any, DtypeNames(("float32", "bfloat16", "float16", "float64"))]


def suggestion(name: Any, names: Iterable[Any]) -> str:
    """Returns `; did you mean 'x'?` for the nearest of `names`, or the empty string."""
    close = difflib.get_close_matches(str(name), [str(n) for n in names], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


@typing.dataclass_transform(frozen_default=True)
def checked_dataclass(cls: type | None = None, *, section: str = "", **options: bool) -> Any:
    """Returns the class as a frozen dataclass that checks its fields, then runs its `__post_init__` if it has one.

    The constructor raises
      TypeError: a value is of another kind than the annotation of its field.
      ValueError: a value is out of bounds, or not one of the names that the field takes.

    Args:
      section: what stands before the names of fields in messages, if any.
      options: further arguments of `dataclasses.dataclass`, such as kw_only.
    """
    if cls is None:
        return functools.partial(checked_dataclass, section=section, **options)
    own, prefix = cls.__dict__.get("__post_init__"), f"{section}." if section else ""

    def __post_init__(self) -> None:
        for name, annotation in _annotations(type(self)).items():
            check_value(prefix + name, getattr(self, name), annotation)
        if own is not None:
            own(self)

    if own is not None or not hasattr(cls, "__post_init__"):
        cls.__post_init__ = __post_init__
    return dataclasses.dataclass(frozen=True, **options)(cls)


def check_value(name: str, value: Any, annotation: Any) -> None:
    """Raises TypeError or ValueError, naming the option, unless the value fits the annotation."""
    mismatch = _mismatch(value, annotation)
    if mismatch is not None:
        error, expected = mismatch
        raise error(f"{name}={value!r}; expected {expected}")


def check_number(
    name: str, value: Any, *, above: int | float | None = None, least: int | float | None = None
) -> None:
    """Raises unless `value` is a finite number above `above` and at least `least`."""
    check_value(name, value, Annotated[float, Bound(least=least, above=above)])


def check_integer(name: str, value: Any, *, least: int) -> None:
    """Raises unless `value` is an integer of at least `least`."""
    check_value(name, value, Annotated[int, Bound(least=least)])


@functools.cache
def _annotations(config_class: type) -> dict[str, Any]:
    hints = typing.get_type_hints(config_class, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class) if field.init}


def _mismatch(value: Any, annotation: Any) -> Mismatch | None:
    """Returns the error and what the annotation expects, or None if the value fits."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return None
    if origin is Annotated:
        base, rule = arguments
        return (
            _wrong_dtype(value, rule.names)
            if isinstance(rule, DtypeNames)
            else _wrong_number(value, base, rule)
        )
    if origin in (typing.Union, types.UnionType):
        return _joined([_mismatch(value, member) for member in arguments])
    if origin is Literal:
        return _wrong_name(value, arguments)
    if annotation is bool:
        fits = isinstance(value, bool | np.bool_)
        return None if fits else (TypeError, "True or False")
    if annotation in (int, float):
        return _wrong_number(value, annotation, SIZE if annotation is int else Bound())
    if annotation in (None, types.NoneType):
        return None if value is None else (TypeError, "None")
    if annotation is str:
        return None if isinstance(value, str) else (TypeError, "a name")
    if origin in (tuple, list, Sequence):
        return _wrong_sequence(value, arguments)
    if origin is Mapping:
        return _wrong_mapping(value, arguments)
    kind = origin or annotation
    return None if isinstance(value, kind) else (TypeError, f"a {kind.__name__}")


def _wrong_number(value: Any, kind: Any, bound: Bound) -> Mismatch | None:
    word = {int: "an integer", float: "a number"}[kind]
    expected = f"{word} {bound}".strip()
    number = numbers.Integral if kind is int else numbers.Real
    if isinstance(value, bool | np.bool_) or not isinstance(value, number):
        return TypeError, expected
    if bound.holds(value):
        return None
    if kind is int:
        expected = str(bound).removeprefix("of ")
    return ValueError, expected if str(bound) else "a finite number"


def _wrong_name(value: Any, names: Sequence[Any]) -> Mismatch | None:
    # By type too: True equals 1.
    if any(type(value) is type(name) and value == name for name in names):
        return None
    hint = suggestion(value, names) if isinstance(value, str) else ""
    expected = _either(repr(name) for name in names) + (f" ({hint.removeprefix('; ')})" if hint else "")
    return (ValueError if isinstance(value, str) else TypeError), expected


def _wrong_dtype(value: Any, names: tuple[str, ...]) -> Mismatch | None:
    try:
        name = None if value is None else jnp.dtype(value).name
    except TypeError:
        name = None
    if name in names:
        return None
    hint = suggestion(value, names) if isinstance(value, str) else ""
    return ValueError, _either(names) + (f" ({hint.removeprefix('; ')})" if hint else "")


def _wrong_sequence(value: Any, items: tuple[Any, ...]) -> Mismatch | None:
    repeated = len(items) == 2 and items[1] is Ellipsis
    one = f"a tuple of {'' if repeated else f'{len(items)} '}{ITEMS.get(items[0], 'values')}"
    if isinstance(value, str) or not isinstance(value, Sequence):
        return TypeError, one
    if not repeated and len(value) != len(items):
        return ValueError, one
    wrong = _first(
        _mismatch(item, items[0] if repeated else kind) for item, kind in zip(value, items * len(value))
    )
    return None if wrong is None else (wrong[0], f"a tuple, each value {wrong[1]}")


def _wrong_mapping(value: Any, kinds: tuple[Any, ...]) -> Mismatch | None:
    if not isinstance(value, Mapping):
        return TypeError, "a dict"
    wrong = _first(_mismatch(part, kind) for item in value.items() for part, kind in zip(item, kinds))
    return None if wrong is None else (wrong[0], f"a dict, each entry {wrong[1]}")


def _first(mismatches: Iterable[Mismatch | None]) -> Mismatch | None:
    return next((mismatch for mismatch in mismatches if mismatch is not None), None)


def _joined(mismatches: list[Mismatch | None]) -> Mismatch | None:
    """Returns the mismatch with all members of a union; a value of the right kind is a ValueError."""
    if None in mismatches:
        return None
    error = ValueError if any(error is ValueError for error, _ in mismatches) else TypeError
    return error, _either(dict.fromkeys(expected for _, expected in mismatches))


def _either(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last
