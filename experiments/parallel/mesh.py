"""The mesh of devices of a run, and the sharding of batches and of the training state."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments.config.loading import MeshConfig
from layers.kernels.sequence_parallel import attention_by, states_by
from layers.sharding import BATCH_AXES, MESH_AXES
from layers.sharding_rules import ShardingRules
from layers.typing import Array


class Devices:
    """A mesh with the axes data, fsdp, tensor, sequence and expert, and shardings of arrays on it.

    The compiler partitions computations along its axes (`AxisType.Auto`); kernels run under `jax.shard_map`.

    Attributes:
      mesh: mesh of all devices in use, those of other hosts included.
      method: how attention sees the keys of other devices where time is sharded.
      states: how states cross the cuts of time.
      otherwise: what becomes of mixers without a form over time.
      rules: mesh axis that shards each logical axis of parameters.
      replicated: sharding of a value that every device holds.
      by_row: sharding of an array whose first axis is sharded over the batch axes.
    """

    def __init__(
        self,
        devices: Sequence[jax.Device] | None = None,
        sizes: MeshConfig | None = None,
        rules: ShardingRules | None = None,
    ):
        """Creates a mesh of `devices`, or of all devices if None.

        Raises:
          ValueError: if the product of the axis sizes is not the number of devices.
        """
        devices = jax.devices() if devices is None else list(devices)
        sizes = sizes or MeshConfig()
        shape = axis_sizes(sizes, len(devices))
        self.method, self.states, self.otherwise = sizes.method, sizes.states, sizes.otherwise
        self.rules = rules or ShardingRules()
        self.mesh = jax.make_mesh(
            tuple(shape.values()), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices
        )
        self.replicated = self._sharding(PartitionSpec())
        self.by_row = self._sharding(PartitionSpec(BATCH_AXES))

    @classmethod
    def first(cls, count: int | None, sizes: MeshConfig | None = None) -> "Devices":
        """Returns a mesh of the first `count` devices, or of all.

        Raises:
          ValueError: if there are fewer, or the mesh needs another number, or $JAX_PLATFORMS names none that is there.
        """
        try:
            found = jax.devices()
        except RuntimeError as error:
            raise ValueError(f"JAX finds no devices: {error}") from None
        if count is not None and not 1 <= count <= len(found):
            raise ValueError(f"num_devices={count}; JAX sees {len(found)} ({found[0].device_kind})")
        return cls(found[:count], sizes)

    def __len__(self) -> int:
        return self.mesh.size

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Returns a context in which functions are traced for this mesh; kernels read the shardings from it."""
        with jax.set_mesh(self.mesh), attention_by(self.method), states_by(self.states):
            yield

    @property
    def row_parts(self) -> int:
        """Number of parts that the rows of a batch are divided into."""
        return math.prod(self.mesh.shape[name] for name in BATCH_AXES)

    def check_rows(self, name: str, rows: int, accumulate: int = 1) -> None:
        """Raises ValueError unless the rows (of each micro-batch) divide evenly over the parts of the mesh."""
        parts = self.row_parts * accumulate
        if rows % parts:
            below, above = rows // parts * parts, -(-rows // parts) * parts
            sizes = " x ".join(f"{axis}={self.mesh.shape[axis]}" for axis in BATCH_AXES)
            pieces = f"{self.row_parts} parts ({sizes})" + (
                f" times {accumulate} micro-batches" if accumulate > 1 else ""
            )
            raise ValueError(
                f"{name}={rows} cannot be divided over {pieces}; use {f'{below} or ' if below else ''}{above}, "
                "or fewer devices (--num_devices)"
            )

    def check_time(self, name: str, length: int) -> None:
        """Raises ValueError unless the sequence axis divides a number of tokens."""
        parts = self.mesh.shape["sequence"]
        if length % parts:
            below, above = length // parts * parts, -(-length // parts) * parts
            raise ValueError(
                f"{name} of {length} tokens cannot be divided over the mesh axis sequence={parts}; use "
                f"{f'{below} or ' if below else ''}{above}, such as by data.bucket_bounds, or another mesh.sequence"
            )

    def check_heads(self, name: str, options: Any) -> None:
        """Raises ValueError unless the tensor axis divides the heads that the config of a mixer names."""
        parts = self.mesh.shape["tensor"]
        for field in ("heads", "kv_heads", "value_heads"):
            count = getattr(options, field, None)
            if isinstance(count, int) and count % parts:
                raise ValueError(
                    f"{name} has {field}={count}, which the mesh axis tensor={parts} does not divide; "
                    f"use a multiple of {parts}, or another mesh.tensor"
                )

    def check_experts(self, declarations: Mapping[str, Any]) -> None:
        """Raises ValueError where the axis expert would only repeat the work: no parameter of the model has experts."""
        parts = self.mesh.shape["expert"]
        if parts > 1 and not any("expert" in d.axes for d in declarations.values()):
            raise ValueError(
                f"mesh.expert={parts} divides the experts of a mixture, and the model has none; use mesh.expert=1, or a "
                "channel mixer with experts, such as 'moe'"
            )

    def shardings(self, declarations: Mapping[str, Any]) -> dict[str, NamedSharding]:
        """Returns the shardings of the arrays of `Declaration`s, by the same names."""
        return {
            name: self._sharding(self.rules.spec(d.axes, d.shape, self.mesh))
            for name, d in declarations.items()
        }

    def my_rows(self, rows: int) -> tuple[int, int]:
        """Returns the part of a batch of `rows` that this process reads: its index, and the number of parts.

        Raises:
          ValueError: if the rows of the devices of this process are not one equal part of the batch.
        """
        if jax.process_count() == 1:
            return 0, 1
        slices = {
            s[0].indices(rows)[:2] for s in self.by_row.addressable_devices_indices_map((rows,)).values()
        }
        start, stop = min(s[0] for s in slices), max(s[1] for s in slices)
        share = stop - start
        if sum(b - a for a, b in slices) != share or rows % share or start % share:
            raise ValueError(
                f"the devices of process {jax.process_index()} hold rows {sorted(slices)} of a batch of {rows}; "
                "order the mesh so that each process holds neighbouring rows"
            )
        return start // share, rows // share

    def put_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """Starts copying a batch to the devices, sharded by rows and time, and returns it.

        With several processes, each passes the rows that `my_rows` names, with all their tokens.
        """
        if jax.process_count() == 1:
            return {name: jax.device_put(array, self.of_batch(array.shape)) for name, array in batch.items()}
        return {
            name: jax.make_array_from_process_local_data(self.of_batch(array.shape), np.asarray(array))
            for name, array in batch.items()
        }

    def of_batch(self, shape: tuple[int, ...], *, micro: bool = False) -> NamedSharding:
        """Returns the sharding of an array (b, t, ...) of a batch, or of all micro-batches (n, b, t, ...).

        Time is whole with several processes, which read whole rows, and where the sequence axis does not divide it.
        """
        time = shape[1 + micro] if len(shape) > 1 + micro else 1
        parts = self.mesh.shape["sequence"]
        cut = parts > 1 and time % parts == 0 and jax.process_count() == 1
        entries = [*[None] * micro, BATCH_AXES, *["sequence"] * cut]
        return self._sharding(PartitionSpec(*entries))

    def abstract_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes, dtypes and sharding of a batch, which is passed with all its rows."""
        return {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=self.of_batch(array.shape))
            for name, array in batch.items()
        }

    def replicate(self, tree: Any) -> Any:
        """Returns arrays copied to every device."""
        return jax.device_put(tree, self.replicated)

    def describe(self) -> str:
        """Returns the number and kind of the devices and the mesh, for records."""
        device = self.mesh.devices.flat[0]
        axes = [f"{name} {size}" for name, size in self.mesh.shape.items() if size > 1]
        hosts = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
        shape = f", {' x '.join(axes)}" if len(axes) > 1 or (axes and not axes[0].startswith("data")) else ""
        return f"{len(self)} x {device.device_kind} ({device.platform}){shape}{hosts}"

    def _sharding(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self.mesh, spec)


def axis_sizes(sizes: MeshConfig, count: int) -> dict[str, int]:
    """Returns the size of each mesh axis for `count` devices; an axis of -1 takes the remaining ones.

    Raises:
      ValueError: if the axes do not multiply to `count`.
    """
    given = {name: getattr(sizes, name) for name in MESH_AXES}
    open_axes = [name for name in MESH_AXES if given[name] == -1]
    fixed = math.prod(size for size in given.values() if size != -1)
    shown = (
        ", ".join(f"{name}={given[name]}" for name in MESH_AXES if given[name] not in (1, -1))
        or "all sizes 1"
    )
    if fixed > count:
        raise ValueError(f"mesh: {shown} takes {fixed} devices, and there are {count}; use smaller axes")
    if count % fixed or (not open_axes and fixed != count):
        raise ValueError(
            f"mesh: {shown} takes {fixed} devices{' or a multiple' if open_axes else ''}, and there are {count}; "
            f"use axes whose product divides {count}, or --num_devices={count // fixed * fixed or fixed}"
        )
    return {name: count // fixed if name in open_axes else given[name] for name in MESH_AXES}


def cpu() -> jax.Device | None:
    """Returns the CPU as a JAX device; None, which keeps the default device, if JAX_PLATFORMS excludes the CPU."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
