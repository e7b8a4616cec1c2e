"""A model as a pure function of its parameters and its running statistics, and both as a few long vectors.

A training step reads and writes every parameter several times (moments, decay, average). As one vector for each group
of the optimizer that is a handful of large operations in place of hundreds of small ones, and a step passes a dozen
arrays between host and device. The model sees its parameters by layer, and so do checkpoints.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from layers.parameters import AuxiliaryLoss, group_of
from layers.typing import Array

Path = tuple[str | int, ...]
Vectors = dict[str, Array]


def path_name(path: Path) -> str:
    """The name of a variable in checkpoints and messages, such as "stack/blocks/0/mixer/b"."""
    return "/".join(map(str, path))


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the arrays of a tree lie in one vector for each group.

    Attributes:
      groups: for each group its arrays in order, as path in the model and shape.
    """

    groups: Mapping[str, tuple[tuple[Path, tuple[int, ...]], ...]]

    @classmethod
    def of(cls, arrays: Mapping[Path, Array], group: Mapping[Path, str]) -> "Layout":
        """The layout of `arrays` with the array at each path in `group[path]`."""
        names = sorted({group[path] for path in arrays})
        return cls(
            {
                name: tuple((path, a.shape) for path, a in arrays.items() if group[path] == name)
                for name in names
            }
        )

    @property
    def sizes(self) -> dict[str, int]:
        """Numbers in the vector of each group."""
        return {name: sum(math.prod(shape) for _, shape in part) for name, part in self.groups.items()}

    def join(self, arrays: Mapping[Path, Array], xp: Any = np) -> Vectors:
        """One vector for each group, from the arrays by path."""
        return {
            name: xp.concatenate([xp.reshape(arrays[path], -1) for path, _ in part])
            for name, part in self.groups.items()
        }

    def cut(self, vectors: Mapping[str, Array]) -> dict[Path, Array]:
        """The arrays by path, from the vectors."""
        arrays = {}
        for name, part in self.groups.items():
            start = 0
            for path, shape in part:
                stop = start + math.prod(shape)
                arrays[path] = vectors[name][start:stop].reshape(shape)
                start = stop
        return arrays


class SplitModel:
    """A model taken apart.

    Attributes:
      parameters: float32 arrays by path, as initialised.
      statistics: running statistics (`nnx.BatchStat`) by path, as initialised.
      declared_groups: the optimizer group that each parameter declared (see `layers.parameters`).
    """

    def __init__(self, model: nnx.Module):
        """Takes `model` apart.

        Raises:
          TypeError: if a parameter or statistic is not float32.
          ValueError: if the model has no parameter, or variables that are neither parameters nor statistics.
        """
        self._graph, parameters, statistics, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
        if others := [f"{path_name(p)} ({type(v).__name__})" for p, v in nnx.to_flat_state(rest)]:
            raise ValueError(
                f"the model holds {', '.join(others)}; a model may hold nnx.Param and nnx.BatchStat only, "
                "and constants as plain arrays or in its config"
            )
        self.parameters = _float32_arrays(parameters)
        self.statistics = _float32_arrays(statistics)
        self._auxiliary = tuple(
            path for path, v in nnx.to_flat_state(statistics) if isinstance(v, AuxiliaryLoss)
        )
        self.declared_groups = {path: group_of(v) for path, v in nnx.to_flat_state(parameters)}
        if not self.parameters:
            raise ValueError("the model has no parameters")

    @property
    def num_parameters(self) -> int:
        """Numbers in all parameters."""
        return sum(array.size for array in self.parameters.values())

    @property
    def has_auxiliary_loss(self) -> bool:
        """Whether a layer adds something to the loss of training."""
        return bool(self._auxiliary)

    def auxiliary_loss(self, statistics: Mapping[Path, Array]) -> Array:
        """What the layers add to the mean loss, from the statistics after a call; 0 if that was no training."""
        return sum((statistics[path] for path in self._auxiliary), jnp.zeros((), jnp.float32))

    def __call__(
        self,
        parameters: Mapping[Path, Array],
        statistics: Mapping[Path, Array],
        batch: Mapping[str, Array],
        *,
        key: jax.Array | None,
    ) -> tuple[Array, dict[Path, Array]]:
        """The model's output on a batch, and the statistics after it; a key means training."""
        # What an earlier step left must not be added again.
        statistics = {**statistics, **{path: jnp.zeros((), jnp.float32) for path in self._auxiliary}}
        state = (traverse_util.unflatten_dict(dict(tree)) for tree in (parameters, statistics))
        model = nnx.merge(self._graph, *state)
        output, _ = model(batch["inputs"], segment_ids=batch.get("segment_ids"), key=key)
        new = nnx.to_flat_state(nnx.state(model, nnx.BatchStat))
        return output, {path: variable[...] for path, variable in new}


def _float32_arrays(state: nnx.State) -> dict[Path, np.ndarray]:
    arrays = {path: np.asarray(variable[...]) for path, variable in nnx.to_flat_state(state)}
    for path, array in arrays.items():
        if array.dtype != np.float32:
            raise TypeError(
                f"{path_name(path)} is {array.dtype}; parameters and statistics are stored as float32 "
                "(complex ones as their real and imaginary parts)"
            )
    return arrays
