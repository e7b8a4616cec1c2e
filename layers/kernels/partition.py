"""How arrays are divided over a mesh, and kernels that run on the part of every device.

XLA cannot divide a kernel call. On a mesh with explicit axes the type of an array says how it is divided. On a mesh with
automatic axes a convention says it: rows over BATCH_AXES, heads or channels over HEAD_AXES, everything else whole.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from layers.kernels import devices

BATCH_AXES = ("data", "fsdp")
HEAD_AXES = ("tensor",)
SEQUENCE_AXIS = "sequence"
AXES = (*BATCH_AXES, *HEAD_AXES, SEQUENCE_AXIS, "expert")


class Mendable(str):
    """A reason that the caller can remove, for example by setting a mesh."""

    __slots__ = ()


def spec_of(x: jax.Array, *, batch: int = 0, heads: int | None = None) -> P:
    """How x is divided, with one entry per axis of x.

    Args:
      x: any array.
      batch, heads: the axes of x that BATCH_AXES and HEAD_AXES divide on a mesh with automatic axes. Mesh axes of size 1
        and those that do not divide the axis of x are left out.
    """
    automatic = _sizes(AxisType.Auto)
    if not automatic:
        return jax.typeof(x).sharding.spec
    entries: list[Any] = [None] * x.ndim
    entries[batch] = _dividing(x.shape[batch], BATCH_AXES, automatic)
    if heads is not None:
        entries[heads] = _dividing(x.shape[heads], HEAD_AXES, automatic)
    return P(*entries)


def spec_of_tokens(x: jax.Array) -> P:
    """How rows and time of x (b, t, ...) are divided where tokens do not depend on each other: over every mesh axis that can.

    On a mesh with automatic axes BATCH_AXES divide rows, and the axes that elsewhere divide heads or time divide time.
    """
    automatic = _sizes(AxisType.Auto)
    if not automatic:
        return P(*jax.typeof(x).sharding.spec[:2])
    return P(
        _dividing(x.shape[0], BATCH_AXES, automatic),
        _dividing(x.shape[1], (*HEAD_AXES, SEQUENCE_AXIS), automatic),
    )


def names_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes in an entry of a spec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def parts(entry: Any) -> int:
    """The number of parts that an entry of a spec makes."""
    names = names_of(entry)
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in names)


def passed_over_reason(x: Any, *, batch: int = 0) -> str | None:
    """Why a kernel would gather what the devices hold, or None.

    Args:
      x: an array of the call, with rows along axis `batch`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        if devices.count() == 1:
            return None
        return Mendable(
            "there are several devices and no mesh; call jax.set_mesh with the mesh of the arrays"
        )
    automatic = _sizes(AxisType.Auto)
    if not automatic:
        return None
    if _sizes(AxisType.Explicit):
        return Mendable("the mesh has explicit and automatic axes; expected one kind")
    if unknown := [name for name in automatic if name not in AXES]:
        return Mendable(f"the mesh divides over {unknown[0]!r}; expected axes among {', '.join(AXES)}")
    if SEQUENCE_AXIS in automatic:
        return f"the mesh divides time over {SEQUENCE_AXIS!r}; the kernel needs whole rows"
    rows = math.prod(automatic.get(name, 1) for name in BATCH_AXES)
    if x.shape[batch] % rows:
        return Mendable(
            f"{x.shape[batch]} rows cannot be divided over {rows} devices ({', '.join(BATCH_AXES)})"
        )
    return None


def over_shards(
    function: Callable[..., Any],
    arrays: Sequence[Any],
    specs: Sequence[Any],
    out_specs: Any,
    *,
    check: bool = True,
) -> Any:
    """Runs `function` on every device's part of the arguments.

    Args:
      function: takes as many arguments as `arrays` has.
      arrays: arrays, trees of arrays, or None.
      specs: how each argument is divided, one spec or a tree of them; on an explicit mesh arrays are resharded to that.
      out_specs: how the results are divided.
      check: whether JAX follows which values differ between devices; kernels of others do not say it.
    """
    if _sizes(AxisType.Auto):
        mesh = jax.sharding.get_abstract_mesh()
        names = {
            n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual
        }
        run = jax.shard_map(
            function, in_specs=tuple(specs), out_specs=out_specs, axis_names=names, check_vma=check
        )
        return run(*arrays)
    given = [jax.typeof(array).sharding.spec for array in jax.tree.leaves(list(arrays))]
    if not any(name is not None for spec in given for name in spec):
        return function(*arrays)
    arrays = [
        jax.tree.map(lambda leaf, spec=spec: jax.reshard(leaf, spec), array)
        for array, spec in zip(arrays, specs, strict=True)
    ]
    return jax.shard_map(function, in_specs=tuple(specs), out_specs=out_specs, check_vma=check)(*arrays)


def _sizes(kind: AxisType) -> dict[str, int]:
    """The mesh axes of a kind that hold more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return {}
    return {
        name: mesh.shape[name]
        for name, one in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if one == kind and mesh.shape[name] > 1
    }


def _dividing(size: int, names: Sequence[str], sizes: dict[str, int]) -> Any:
    """The mesh axes among `names` that together divide an axis of this size, as an entry of a spec."""
    chosen: list[str] = []
    for name in names:
        if name in sizes and size % sizes[name] == 0:
            chosen.append(name)
            size //= sizes[name]
    return None if not chosen else chosen[0] if len(chosen) == 1 else tuple(chosen)
