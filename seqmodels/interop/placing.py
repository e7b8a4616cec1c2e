"""Arrays that are written piece by piece, each part where the device that holds it reads it."""

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from layers.parameters import axes_of
from layers.sharding_rules import ShardingRules

# CPUs take memory that begins at a multiple of this many bytes as it is, without a copy.
ALIGNMENT = 64


def default_sharding(mesh: Mesh | None) -> Sharding:
    """Returns the sharding of an array that all devices of the mesh hold, or the default device if there is none."""
    if mesh is not None:
        return NamedSharding(mesh, PartitionSpec())
    return jax.device_put(np.zeros(())).sharding


def sharding_of(variable: nnx.Variable, mesh: Mesh | None, rules: ShardingRules) -> Sharding:
    """Returns the sharding of a parameter on the mesh, or on the default device if there is none."""
    if mesh is None:
        return default_sharding(None)
    return NamedSharding(mesh, rules.spec(axes_of(variable), variable.shape, mesh))


class Parts:
    """The parts of an array that the devices of this process hold, in host memory until all are written.

    Attributes:
      shape, dtype, sharding: those of the array.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding):
        self.shape, self.dtype, self.sharding = shape, np.dtype(dtype), sharding
        self._places = {
            device: tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
            for device, index in sharding.addressable_devices_indices_map(shape).items()
        }
        self._buffers = {
            place: _aligned(tuple(stop - start for start, stop in place), self.dtype)
            for place in set(self._places.values())
        }

    def write(self, piece: np.ndarray | float, number: int | None) -> None:
        """Writes the whole array, or its entry of a number along the first axis; a float fills it."""
        for place, buffer in self._buffers.items():
            rest = place
            if number is not None:
                (start, stop), *rest = place
                if not start <= number < stop:
                    continue
                buffer = buffer[number - start]
            cut = tuple(slice(*bounds) for bounds in rest)
            buffer[...] = piece if isinstance(piece, float) else piece[cut]

    def array(self) -> jax.Array:
        """Returns the array on the devices."""
        parts = [
            jax.device_put(self._buffers[place], device, may_alias=True)
            for device, place in self._places.items()
        ]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, parts)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
