"""Arrays that are written piece by piece, each part where the device that holds it reads it."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from layers.parameters import axes_of
from layers.sharding_rules import ShardingRules
from seqmodels.interop.files import aligned

# Rows and columns of the blocks in which hosts transpose.
TILE = 64


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
        self._buffers: dict[Any, np.ndarray] = {}
        self._whole: np.ndarray | None = None

    def write(self, piece: np.ndarray | float, number: int | None) -> None:
        """Writes the whole array, or its entry of a number along the first axis; a float fills it."""
        if number is None and not isinstance(piece, float):
            self._whole = piece
            return
        for place in set(self._places.values()):
            if place not in self._buffers:
                self._buffers[place] = aligned(tuple(stop - start for start, stop in place), self.dtype)
            buffer, rest = self._buffers[place], place
            if number is not None:
                (start, stop), *rest = place
                if not start <= number < stop:
                    continue
                buffer = buffer[number - start]
            if isinstance(piece, float):
                buffer[...] = piece
            else:
                _copy(buffer, piece[tuple(slice(*bounds) for bounds in rest)])

    def array(self) -> jax.Array:
        """Returns the array on the devices."""
        parts = [self._part(place, device) for device, place in self._places.items()]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, parts)

    def _part(self, place: Any, device: jax.Device) -> jax.Array:
        if self._whole is None:
            return jax.device_put(self._buffers[place], device, may_alias=True)
        part = self._whole[tuple(slice(*bounds) for bounds in place)]
        if is_turned(self._whole):
            # Devices transpose many times faster than a host copies what is not contiguous.
            moved = jax.device_put(np.swapaxes(part, -1, -2), device, may_alias=True)
            return _turned(moved, dtype=self.dtype)
        return jax.device_put(part.astype(self.dtype, copy=False), device, may_alias=True)


def is_turned(array: np.ndarray) -> bool:
    """Returns whether an array is contiguous but for its last two axes, which are exchanged."""
    return array.ndim > 1 and not array.flags.c_contiguous and np.swapaxes(array, -1, -2).flags.c_contiguous


@functools.partial(jax.jit, static_argnames=("dtype",))
def _turned(array: jax.Array, dtype: Any) -> jax.Array:
    return jnp.swapaxes(array, -1, -2).astype(dtype)


def _copy(into: np.ndarray, piece: np.ndarray) -> None:
    """Copies an array, by blocks that fit into caches if it is the transpose of one in order."""
    if piece.ndim != 2 or piece.flags.c_contiguous:
        into[...] = piece
        return
    for i, j in itertools.product(*(range(0, size, TILE) for size in piece.shape)):
        into[i : i + TILE, j : j + TILE] = piece[i : i + TILE, j : j + TILE]
