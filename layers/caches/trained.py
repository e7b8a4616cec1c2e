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


def read_trained(option: str, given: Any, names: Sequence[str]) -> Trained:
    """Returns the arrays of an npz file, or those given.

    Args:
      option: the name of the option, for messages.
      given: `Trained`, or the path of a file that `Trained.save` wrote.
      names: of the arrays of a layer.

    Raises:
      ValueError: the file cannot be read, or does not have these arrays.
      TypeError: something else is given.
    """
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
