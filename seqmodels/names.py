"""Names of a model's variables by layer, whether or not the stack holds them stacked.

A variable of layer 3 is called "stack/blocks/3/mixer/b" in checkpoints and messages. Where `seqmodels.stack.Stack` holds
the variables of several layers as one stacked array, that array has one name per layer.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

STACKED, BLOCKS = "stacked", "blocks"
Path = tuple[str | int, ...]


class Names(NamedTuple):
    """The names of a variable.

    Attributes:
      names: one name, or one per layer along the first axis of a stacked array.
      stacked: whether the array is stacked.
    """

    names: tuple[str, ...]
    stacked: bool


def names_of(path: Path, variable: nnx.Variable) -> Names:
    """Returns the names by layer of the variable at `path` in a model."""
    layers = variable.get_metadata().get("layers")
    if layers is None:
        return Names(("/".join(map(str, path)),), False)
    at = next(
        i for i, part in enumerate(path[:-1]) if part in (STACKED, BLOCKS) and isinstance(path[i + 1], int)
    )
    names = tuple("/".join(map(str, (*path[:at], BLOCKS, layer, *path[at + 2 :]))) for layer in layers)
    return Names(names, path[at] == STACKED)


def split_layers(names: Names, array: Any) -> dict[str, Any]:
    """Returns an array by the names of its layers; a stacked one is split along its first axis."""
    if not names.stacked:
        return {names.names[0]: array}
    return {name: array[number] for number, name in enumerate(names.names)}


def join_layers(names: Names, arrays: Mapping[str, Any]) -> Any:
    """Returns the array whose parts are given; the inverse of `split_layers`."""
    if not names.stacked:
        return arrays[names.names[0]]
    return jnp.stack([arrays[name] for name in names.names])


def by_layer(model: Any) -> dict[str, jax.Array]:
    """Returns all variables of a model, or of an `nnx.State` of it, by the names of their layers."""
    state = nnx.state(model) if isinstance(model, nnx.Module) else model
    found: dict[str, jax.Array] = {}
    for path, variable in nnx.to_flat_state(state):
        found |= split_layers(names_of(path, variable), variable[...])
    return found
