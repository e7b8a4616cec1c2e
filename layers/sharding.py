"""Where activations lie on a mesh of devices.

Training sets a mesh (`jax.set_mesh`) with the axes of `MESH_AXES`; without a mesh, nothing here has an effect. Rows of a
batch are divided over the axes of `BATCH_AXES`, their tokens over `SEQUENCE_AXES`. The compiler places whatever is not named here.
"""

import math

import jax
from jax.sharding import AxisType, PartitionSpec

from layers.typing import Array

MESH_AXES = ("data", "fsdp", "tensor", "sequence", "expert")
BATCH_AXES = ("data", "fsdp")
SEQUENCE_AXES = ("sequence",)


def divide_batch(x: Array) -> Array:
    """Returns x (b, t, ...) with rows divided over the batch axes of the current mesh, time over `sequence`, the rest whole.

    An axis of x that its mesh axes do not divide is whole. Returns x unchanged if there is no such mesh or inside
    `jax.shard_map`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return x
    entries: list[tuple[str, ...] | None] = []
    for size, names in zip(x.shape, (BATCH_AXES, SEQUENCE_AXES), strict=False):
        axes = tuple(name for name in names if mesh.shape.get(name, 1) > 1)
        parts = math.prod(mesh.shape[name] for name in axes)
        entries.append(None if parts == 1 or size % parts else axes)
    if not any(entries):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))
