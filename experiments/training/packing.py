"""Small parameters of a model as few long vectors.

A small model has hundreds of arrays of a few thousand numbers each, and a training step reads and writes all of them
several times (moments, decay, average). As one vector per group of the optimizer that is a handful of operations in place
of hundreds, each of which would be bound by the launch of its kernel.
"""

from collections.abc import Mapping

import jax.numpy as jnp

from experiments.parallel.mesh import Devices
from experiments.training.model import Arrays, Declaration
from experiments.training.optimizers import Optimizer
from layers.typing import Array

# Numbers from which an array stays by itself.
LARGEST = 2**16
PREFIX = "packed"


class Packing:
    """Which parameters are held in vectors.

    Packed are arrays of fewer than `LARGEST` numbers that every device holds whole and that the update rule treats number
    by number: all such arrays of one group and type make one vector.

    Attributes:
      declarations: of what is held, by name: vectors and the arrays that are not packed.
    """

    def __init__(self, parameters: Mapping[str, Declaration], optimizer: Optimizer, devices: Devices):
        """Chooses the arrays; see the class."""
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
        """The vectors and the arrays that are not packed, from all arrays by the paths of the model."""
        held = {name: array for name, array in arrays.items() if name in self.declarations}
        for vector, members in self._members.items():
            held[vector] = jnp.concatenate([jnp.ravel(arrays[name]) for name in members])
        return held

    def cut(self, held: Mapping[str, Array]) -> Arrays:
        """The inverse of `join`."""
        arrays = {name: array for name, array in held.items() if name not in self._members}
        for vector, members in self._members.items():
            start = 0
            for name, declaration in members.items():
                arrays[name] = held[vector][start : start + declaration.size].reshape(declaration.shape)
                start += declaration.size
        return arrays
