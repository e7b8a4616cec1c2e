"""Packing of a model's small parameters into a few long vectors.

A small model has hundreds of arrays of a few thousand elements each, and a training step reads and writes all of them
several times (moments, decay, average). One vector per group of the optimizer takes a few operations in place of
hundreds, each of which is bound by the launch of its kernel.
"""

from collections.abc import Mapping

import jax.numpy as jnp

from experiments.parallel.mesh import Devices
from experiments.training.model import Arrays, Declaration
from experiments.training.optimizers import Optimizer
from layers.typing import Array

# Number of elements from which an array is not packed.
LARGEST = 2**16
PREFIX = "packed"


class Packing:
    """The parameters that are packed into vectors.

    It packs replicated arrays of fewer than `LARGEST` elements that the update rule treats elementwise: all such arrays
    of one group and dtype form one vector.

    Attributes:
      declarations: declarations by name of the vectors and of the arrays that are not packed.
    """

    def __init__(self, parameters: Mapping[str, Declaration], optimizer: Optimizer, devices: Devices):
        """Chooses the arrays to pack."""
        shardings = devices.shardings(parameters)
        self._members: dict[str, dict[str, Declaration]] = {}
        self.declarations: dict[str, Declaration] = {}
        for name, declaration in parameters.items():
            small = declaration.size < LARGEST and shardings[name].is_fully_replicated
            if small and optimizer.is_elementwise(declaration):
                vector = f"{PREFIX}/{optimizer.groups[name].name}/{declaration.dtype}"
                self._members.setdefault(vector, {})[name] = declaration
            else:
                self.declarations[name] = declaration
        self.declarations |= {name: Declaration.of_vector(members) for name, members in self._members.items()}

    def join(self, arrays: Arrays) -> Arrays:
        """Returns the vectors and the arrays that are not packed, from all arrays by the paths of the model."""
        held = {name: array for name, array in arrays.items() if name in self.declarations}
        for vector, members in self._members.items():
            held[vector] = jnp.concatenate([jnp.ravel(arrays[name]) for name in members])
        return held

    def cut(self, held: Mapping[str, Array]) -> Arrays:
        """Returns all arrays by the paths of the model; the inverse of `join`."""
        arrays = {name: array for name, array in held.items() if name not in self._members}
        for vector, members in self._members.items():
            start = 0
            for name, declaration in members.items():
                arrays[name] = held[vector][start : start + declaration.size].reshape(declaration.shape)
                start += declaration.size
        return arrays
