"""What the Pallas kernels for TPUs share: where they can run, and how they are called."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from layers.kernels import devices, partition

# None: compiled, on a TPU and nowhere else. Parameters of an interpreter (`pltpu.InterpretParams`, or True for the
# simple one): interpreted, on any device. False: compiled whatever the device, to lower for a TPU from elsewhere.
INTERPRET: pltpu.InterpretParams | bool | None = None

# Lanes per vector register; the last axis of a block should be a multiple of it.
LANES = 128
# Rows of a vector register of 32-bit numbers.
SUBLANES = 8


def unavailable(*arrays: jax.Array | None) -> str | None:
    """Why kernels cannot run here, or cannot take arrays of these types, or None."""
    if INTERPRET is None and devices.backend() != "tpu":
        return f"the device is a {devices.backend()}; expected a TPU"
    for array in arrays:
        if array is not None and array.dtype not in (jnp.float32, jnp.bfloat16, jnp.complex64):
            return f"an array has dtype {array.dtype}; expected float32, bfloat16 or complex64"
    return None


def passed_over_reason(x: jax.Array) -> str | None:
    """Why `impl=None` does not choose a kernel, or None; x has rows along its first axis."""
    if INTERPRET is not None or devices.backend() != "tpu":
        return f"the device is a {devices.backend()}; expected a TPU"
    return partition.passed_over_reason(x)


def call(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    parallel: int,
    inputs: Sequence[Sequence[tuple[jax.Array, pl.BlockSpec]]],
    outputs: Sequence[Sequence[tuple[tuple[int, ...], Any, pl.BlockSpec]]],
    scratch: Sequence[Sequence[Any]],
    interpret: pltpu.InterpretParams | bool | None,
    name: str,
) -> list[list[jax.Array]]:
    """Runs `kernel` over a grid whose first `parallel` axes may run in any order and whose others run in order.

    Inputs are arrays with their block specs, outputs are shapes and types with theirs, scratch is memory. Each comes in
    groups: the kernel takes its references as one list per group, and the outputs are returned in groups.
    """
    arrays, in_specs = zip(*itertools.chain(*inputs), strict=True)
    # Inside `jax.shard_map`, outputs differ between devices where any input does.
    varying = max(
        (jax.typeof(array).manual_axis_type for array in arrays), key=lambda kind: len(kind.varying)
    )
    if interpret is True and varying.varying:
        # The simple interpreter does not follow what differs between devices.
        interpret = pltpu.InterpretParams()
    made = list(itertools.chain(*outputs))
    run = pl.pallas_call(
        lambda *refs: kernel(*_grouped(refs, [*inputs, *outputs, *scratch])),
        grid=grid,
        in_specs=in_specs,
        out_specs=[spec for *_, spec in made],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying) for shape, dtype, _ in made],
        scratch_shapes=list(itertools.chain(*scratch)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * parallel + ("arbitrary",) * (len(grid) - parallel)
        ),
        interpret=interpret or False,
        name=name,
    )
    return _grouped(run(*arrays), outputs)


def _grouped(items: Iterable[Any], groups: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Splits a flat sequence into lists with the lengths of `groups`."""
    items = iter(items)
    return [[next(items) for _ in group] for group in groups]


def column(row: jax.Array) -> jax.Array:
    """(1, n) to (n, 1), from lanes to sublanes, without rounding."""
    size = row.shape[-1]
    at = [jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1)]
    return jnp.sum(jnp.where(at[0] == at[1], row, 0), axis=1, keepdims=True)


def row(column: jax.Array) -> jax.Array:
    """(n, 1) to (1, n), from sublanes to lanes, without rounding."""
    size = column.shape[0]
    at = [jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1)]
    return jnp.sum(jnp.where(at[0] == at[1], column, 0), axis=0, keepdims=True)


def up(count: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not less than `count`."""
    return -(-count // multiple) * multiple
