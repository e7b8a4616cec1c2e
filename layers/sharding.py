"""Where activations lie on a mesh of devices.

Training sets a mesh (`jax.set_mesh`) with the axes of `MESH_AXES`; without a mesh, nothing here has an effect. Rows of a
batch are divided over the axes of `BATCH_AXES`. The compiler places whatever is not named here.
"""

import jax
from jax.sharding import AxisType, PartitionSpec

from layers.typing import Array

MESH_AXES = ("data", "fsdp", "tensor", "sequence", "expert")
BATCH_AXES = ("data", "fsdp")


def divide_rows(x: Array) -> Array:
    """Returns x with its first axis divided over the batch axes of the current mesh, and its other axes whole.

    Returns x unchanged if there is no such mesh, inside `jax.shard_map`, or if the axes do not divide the rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return x
    axes = tuple(name for name in BATCH_AXES if mesh.shape.get(name, 1) > 1)
    parts = 1
    for name in axes:
        parts *= mesh.shape[name]
    if parts == 1 or x.shape[0] % parts:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes))
