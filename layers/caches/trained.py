"""Arrays that were trained for the layers of a model, which a policy is given."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Trained:
    """Arrays by name for each layer with a cache, in order. Two are equal if their arrays are.

    Attributes:
      layers: the arrays of each layer.
    """

    def __init__(self, layers: Sequence[Mapping[str, Any]]):
        self.layers = [{name: np.asarray(x, np.float32) for name, x in sorted(one.items())} for one in layers]
        found = hashlib.sha256()
        for one in self.layers:
            for name, x in one.items():
                found.update(f"{name} {x.shape}".encode() + x.tobytes())
        self._digest = found.hexdigest()

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Trained) and other._digest == self._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    def __repr__(self) -> str:
        return f"<{len(self.layers)} layers, {self._digest[:8]}>"

    def save(self, file: str | Path) -> None:
        """Writes the arrays to an npz file, each named LAYER/NAME."""
        with open(file, "wb") as opened:
            np.savez(
                opened,
                **{
                    f"{number}/{name}": x for number, one in enumerate(self.layers) for name, x in one.items()
                },
            )


def read_trained(option: str, given: Any, names: Sequence[str], *, policy: str, maker: str) -> Trained:
    """Returns the arrays of an npz file, or those given.

    Args:
      option: the name of the option, for messages.
      given: `Trained`, or the path of a file that `Trained.save` wrote.
      names: of the arrays of a layer.
      policy: the name of the policy, for messages.
      maker: the function that makes such files, for messages.

    Raises:
      ValueError: nothing is given, the file cannot be read, or does not have these arrays.
      TypeError: something else is given.
    """
    if given is None:
        raise ValueError(
            f"{option}=None of the cache {policy!r}, whose {option} are trained for the model; expected a file that {maker} makes"
        )
    if isinstance(given, Trained):
        return given
    if not isinstance(given, str):
        raise TypeError(f"{option} is a {type(given).__name__}; expected the path of an npz file")
    try:
        with np.load(given, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except OSError as error:
        raise ValueError(
            f"{option}={given!r} cannot be read: {error.strerror or 'it is no npz file'}"
        ) from None
    except (ValueError, EOFError):
        raise ValueError(f"{option}={given!r} is no npz file of arrays") from None
    count = len({name.partition("/")[0] for name in found})
    wanted = {f"{layer}/{name}" for layer in range(count) for name in names}
    if not found or wanted != set(found):
        raise ValueError(
            f"{option}={given!r} has the arrays {', '.join(sorted(found)) or 'none'}; expected {', '.join(names)} per layer, such as "
            f"0/{names[0]}"
        )
    return Trained([{name: found[f"{layer}/{name}"] for name in names} for layer in range(count)])


def check_trained(
    option: str, given: Trained, layers: Mapping[int, Any], *, policy: str, ends: tuple[str, str]
) -> None:
    """Raises ValueError unless arrays are those of the layers with a cache, in order, and map their [q, k, v] to a number per key/value head.

    Args:
      option, policy: their names, for messages.
      given: the arrays.
      layers: the config of each layer with a cache, by its number.
      ends: the arrays whose first axis is that of the features, and whose last axis is that of the heads.
    """
    if len(given.layers) != len(layers):
        raise ValueError(
            f"{option} of the cache {policy!r} has {len(given.layers)} layers; expected {len(layers)}, the layers "
            f"{', '.join(map(str, layers))} of the model, which have a cache"
        )
    for arrays, (layer, config) in zip(given.layers, layers.items(), strict=True):
        expected = (config.heads + 2 * config.groups) * config.size, config.groups
        found = arrays[ends[0]].shape[0], arrays[ends[1]].shape[-1]
        if found != expected:
            raise ValueError(
                f"{option} of the cache {policy!r} map {found[0]} features to {found[1]} numbers in layer {layer}; expected "
                f"{expected[0]} and {expected[1]}, as the model has"
            )
