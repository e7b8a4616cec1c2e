"""Data parallelism over the local devices: batches cut along rows, everything else on every device."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from layers.typing import Array

AXIS = "data"


class Devices:
    """A mesh of one axis, "data", and how arrays lie on it.

    Attributes:
      mesh: of all devices in use.
      replicated: the sharding of a value that every device holds.
      by_row: the sharding of an array whose first axis is cut over the devices.
    """

    def __init__(self, devices: Sequence[jax.Device] | None = None):
        """A mesh of `devices`, all local ones if None."""
        devices = jax.local_devices() if devices is None else list(devices)
        self.mesh = jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        self.by_row = NamedSharding(self.mesh, PartitionSpec(AXIS))
        self.by_second_axis = NamedSharding(self.mesh, PartitionSpec(None, AXIS))

    @classmethod
    def first(cls, count: int | None) -> "Devices":
        """The first `count` local devices, or all.

        Raises:
          ValueError: if there are fewer.
        """
        found = jax.local_devices()
        if count is not None and not 1 <= count <= len(found):
            raise ValueError(f"num_devices={count}; this machine has {len(found)} ({found[0].device_kind})")
        return cls(found[:count])

    def __len__(self) -> int:
        return self.mesh.size

    def check_rows(self, name: str, rows: int, accumulate: int = 1) -> None:
        """Raises ValueError unless every device gets as many of the rows (of each micro-batch) as the others."""
        parts = len(self) * accumulate
        if rows % parts:
            below, above = rows // parts * parts, -(-rows // parts) * parts
            pieces = f"{len(self)} devices" + (f" times {accumulate} micro-batches" if accumulate > 1 else "")
            raise ValueError(
                f"{name}={rows} cannot be divided over {pieces}; use {f'{below} or ' if below else ''}{above}, "
                "or fewer devices (--num_devices)"
            )

    def put_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """Starts copying a batch to the devices, a share of the rows to each."""
        return jax.device_put(dict(batch), self.by_row)

    def abstract_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, types and sharding of a batch."""
        return {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=self.by_row)
            for name, array in batch.items()
        }

    def replicate(self, tree: Any) -> Any:
        """Copies arrays to every device."""
        return jax.device_put(tree, self.replicated)

    def describe(self) -> str:
        """Number and kind of the devices, for records."""
        device = self.mesh.devices.flat[0]
        return f"{len(self)} x {device.device_kind} ({device.platform})"


def cpu() -> jax.Device | None:
    """The CPU as a device of JAX; None, which leaves the default device as it is, if JAX_PLATFORMS leaves out the CPU."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
