"""The variables of a model beside the tensors of a checkpoint: which belongs to which, and in what shape."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from flax import nnx

from layers.options import suggestion
from seqmodels.config import ModelConfig
from seqmodels.interop.family import Family, Pair
from seqmodels.names import names_of

Shape = tuple[int, ...]
# Variables that checkpoints hold: parameters, and what training moves without a gradient, such as the biases of routers.
STORED = (nnx.Param, nnx.BatchStat)


class Table(NamedTuple):
    """Pairs of a model by the names of its variables.

    Attributes:
      pairs: per variable with tensors, the pair and the place of the variable in it.
      shapes: shapes of their tensors by name.
      constants: values of variables without tensors.
    """

    pairs: Mapping[str, tuple[Pair, int]]
    shapes: Mapping[str, Shape]
    constants: Mapping[str, float]


def make_table(family: Family, config: ModelConfig, model: nnx.Module) -> Table:
    """Returns the table of a model, of which only shapes are used.

    Raises:
      ValueError: the family has no tensor for a parameter of the model.
    """
    own: dict[str, Shape] = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, STORED)):
        names = names_of(path, variable)
        own |= dict.fromkeys(names.names, variable.shape[1:] if names.stacked else variable.shape)
    pairs: dict[str, tuple[Pair, int]] = {}
    shapes: dict[str, Shape] = {}
    for pair in family.pairs(config):
        present = [name in own for name in pair.ours]
        if not any(present):
            continue
        zeros = [np.broadcast_to(np.zeros((), np.float32), own[name]) for name in pair.ours]
        shapes |= zip(pair.theirs, (array.shape for array in pair.save(*zeros)), strict=True)
        pairs |= {name: (pair, place) for place, name in enumerate(pair.ours)}
    constants = {name: value for name in own if (value := family.constant(name)) is not None}
    if left := sorted(own.keys() - pairs.keys() - constants.keys()):
        raise ValueError(f"{family.architecture} has no tensor for {', '.join(left[:3])} of the model")
    return Table(pairs, shapes, constants)


def check_tensors(expected: Mapping[str, Shape], found: Mapping[str, Shape], *, of: str) -> None:
    """Raises ValueError if tensors are missing, surplus or of another shape."""
    missing, surplus = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing:
        near = suggestion(missing[0], surplus) if surplus else ""
        raise ValueError(f"{of} lacks {_first(missing)}{near}, which its config.json asks for")
    if surplus:
        raise ValueError(f"{of} has {_first(surplus)}, which its config.json does not ask for")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f"{of} has {name} of shape {found[name]}; its config.json asks for {shape}")


def _first(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"the tensor{'s' if len(names) > 1 else ''} {', '.join(names[:most])}{more}"
