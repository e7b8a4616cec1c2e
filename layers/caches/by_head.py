"""Numbers per layer and key/value head, which a policy is given: measured or trained for a model."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layers.options import check_number


def read_heads(option: str, given: Any, *, least: float | None = 0) -> tuple[tuple[float, ...], ...]:
    """Returns numbers per layer and head, from nested sequences or a JSON file of a list of lists.

    Args:
      option: the name of the option, for messages.
      given: the numbers, or the path of the file.
      least: the smallest number that is possible; None for any.

    Raises:
      ValueError, TypeError: there is no such file, or it holds something else.
    """
    given = read_json(option, given)
    if not _listed(given) or not given or not all(_listed(layer) and layer for layer in given):
        raise TypeError(
            f"{option}={given!r}; expected a list per layer of one number per key/value head, or a JSON file of them"
        )
    for layer, numbers in enumerate(given):
        for head, number in enumerate(numbers):
            check_number(f"{option}[{layer}][{head}]", number, least=least)
    return tuple(tuple(float(number) for number in layer) for layer in given)


def read_json(option: str, given: Any) -> Any:
    """Returns what a JSON file holds if its path is given, and otherwise what is given; raises ValueError if it cannot be read."""
    if not isinstance(given, str):
        return given
    try:
        return json.loads(Path(given).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{option}={given!r} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{option}={given!r} is no JSON: {error}") from None


def check_heads(option: str, given: Sequence[Sequence[float]], layers: Mapping[int, Any]) -> None:
    """Raises ValueError unless there are numbers for the layers with a cache, in order, and for their key/value heads."""
    if len(given) != len(layers):
        raise ValueError(
            f"{option} of the cache has {len(given)} layers; expected {len(layers)}, the layers {', '.join(map(str, layers))} of "
            "the model, which have a cache"
        )
    for numbers, (layer, config) in zip(given, layers.items(), strict=True):
        if len(numbers) != config.groups:
            raise ValueError(
                f"{option} of the cache has {len(numbers)} heads for layer {layer}; expected {config.groups}, its key/value heads"
            )


def _listed(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
