"""Sharding of parameters over a mesh of devices."""

import dataclasses
import math
from collections.abc import Mapping

from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from layers.parameters import Axes

# Arrays with fewer elements are replicated: sharding them saves little and costs a collective.
SMALLEST = 2**12


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """The mesh axis that shards each logical axis of parameters (see `layers.parameters`).

    The mesh axes mean:

        data      copies of the model, each with a part of every batch
        fsdp      parts of every batch too, and parameters divided in memory, gathered where they are used
        tensor    heads and hidden features divided, each part computed by its own devices
        sequence  time divided
        expert    experts divided

    Attributes:
      axes: mesh axis by logical axis; logical axes without an entry are not sharded.
      smallest: number of elements below which arrays are replicated.
    """

    axes: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {
            "embed": "fsdp",
            "heads": "tensor",
            "inner": "tensor",
            "mlp": "tensor",
            "vocab": "tensor",
            "expert": "expert",
        }
    )
    smallest: int = SMALLEST

    def spec(self, axes: Axes, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
        """Returns the partition of an array with these logical axes over `mesh`.

        An axis whose size is not divisible by its mesh axis is not sharded. If fsdp shards none of the named axes, it
        shards the largest other axis that it divides, so that no large array is replicated.
        """
        whole = PartitionSpec(*(None for _ in shape))
        if math.prod(shape) < self.smallest:
            return whole
        entries: list[str | None] = [None] * len(shape)
        for place, (name, size) in enumerate(zip(axes, shape, strict=True)):
            chosen = self.axes.get(name) if name else None
            parts = mesh.shape.get(chosen, 1)
            if parts > 1 and size % parts == 0 and chosen not in entries:
                entries[place] = chosen
        parts = mesh.shape.get("fsdp", 1)
        if parts > 1 and "fsdp" not in entries:
            free = [
                i
                for i, entry in enumerate(entries)
                if entry is None and shape[i] % parts == 0 and axes[i] != "layer"
            ]
            if free:
                entries[max(free, key=lambda i: shape[i])] = "fsdp"
        return PartitionSpec(*entries)
