"""Products of one row with matrices, y_i = x W_i, by Pallas's Triton backend: what decoding a single text spends its time on.

A program takes some columns of one of the matrices and all rows of it, a few at a time, of which the next are on their way while
those before are multiplied. Products and sums are float32. Bound by reading the matrices once; several matrices of one input are one
launch.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layers.kernels import devices, pallas_triton, partition
from layers.kernels.mosaic_gpu import lowered_once
from layers.kernels.pallas_triton import launch, pl, pltriton
from layers.kernels.sizes import known

# Fewest numbers in all matrices together for which the launch is worth it.
FEWEST = 1 << 18
ZERO = np.int32(0)


class Settings(NamedTuple):
    """How the matrices are cut.

    Attributes:
      columns: columns per program.
      rows: rows that a program loads at once.
      warps: warps per program.
    """

    columns: int = 16
    rows: int = 1024
    warps: int = 8


SETTINGS = Settings()


def passed_over_reason(x: jax.Array, matrices: Sequence[jax.Array]) -> str | None:
    """Why `products` does not take a call, or None."""
    if not all(map(known, x.shape)) or x.size != x.shape[-1]:
        return "it is for one row"
    if devices.backend() != "gpu":
        return devices.hopper_refusal()
    if x.dtype not in (jnp.bfloat16, jnp.float16) or any(matrix.dtype != x.dtype for matrix in matrices):
        return "it takes a row and matrices all bfloat16 or all float16"
    if sum(matrix.size for matrix in matrices) < FEWEST:
        return f"it is for at least {FEWEST} numbers in all matrices together"
    return partition.passed_over_reason(x) or pallas_triton.refusal(_probe)


def products(x: jax.Array, matrices: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Returns x W_i (..., n_i), in the type of x, for one row x (..., k) and matrices (k, n_i)."""
    return tuple(y.reshape(*x.shape[:-1], -1) for y in _products(x.reshape(-1), tuple(matrices)))


@jax.custom_vjp
def _products(x, matrices):
    return _run(x, matrices)


def _forward(x, matrices):
    return _run(x, matrices), (x, matrices)


def _backward(residuals, cotangents):
    x, matrices = residuals
    wide = [
        jnp.matmul(matrix, d, preferred_element_type=jnp.float32)
        for matrix, d in zip(matrices, cotangents, strict=True)
    ]
    return sum(wide).astype(x.dtype), tuple(jnp.outer(x, d) for d in cotangents)


_products.defvjp(_forward, _backward)


@jax.custom_batching.custom_vmap
def _run(x, matrices):
    return _launched(SETTINGS, x, *matrices)


@_run.def_vmap
def _batched(size, batched, x, matrices):
    """Several rows are a product of matrices."""
    del size
    axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, tuple(batched))
    made = jax.vmap(lambda x, matrices: tuple(x @ matrix for matrix in matrices), in_axes=axes)(x, matrices)
    return made, jax.tree.map(lambda _: True, made)


@lowered_once("settings")
def _launched(settings: Settings, x: jax.Array, *matrices: jax.Array) -> tuple[jax.Array, ...]:
    blocks = [-(-matrix.shape[1] // settings.columns) for matrix in matrices]
    names = [f"y{number}" for number in range(len(matrices))]
    made = launch(
        functools.partial(_part, settings, blocks),
        name="one_row",
        grid=(sum(blocks),),
        inputs={"x": x} | {f"w{number}": matrix for number, matrix in enumerate(matrices)},
        outputs={
            name: jax.ShapeDtypeStruct((matrix.shape[1],), x.dtype)
            for name, matrix in zip(names, matrices, strict=True)
        },
        warps=settings.warps,
    )
    return tuple(made[name] for name in names)


def _part(settings: Settings, blocks: Sequence[int], *, x: Any, **refs: Any) -> None:
    """Some columns of one of the matrices."""
    program, first = pl.program_id(0), 0
    for number, count in enumerate(blocks):
        w, y = refs[f"w{number}"], refs[f"y{number}"]
        run = functools.partial(_columns, settings, x, w, y, program - first)
        if len(blocks) == 1:
            run()
        else:
            pl.when((program >= first) & (program < first + count))(run)
        first += count


def _columns(settings: Settings, x: Any, w: Any, y: Any, block: Any) -> None:
    inputs, outputs = w.shape
    rows = min(settings.rows, pl.next_power_of_2(inputs))
    columns = pl.ds(block * settings.columns, settings.columns)
    inside = block * settings.columns + jnp.arange(settings.columns) < outputs

    def load(number: Any) -> tuple[jax.Array, jax.Array]:
        first = number * rows
        here = first + jnp.arange(rows) < inputs
        part = pltriton.load(x.at[pl.ds(first, rows)], mask=here, other=0)
        tile = pltriton.load(w.at[pl.ds(first, rows), columns], mask=here[:, None] & inside[None], other=0)
        return part, tile

    def added(total: Any, part: Any, tile: Any) -> Any:
        return total + (part.astype(jnp.float32)[:, None] * tile.astype(jnp.float32)).sum(0)

    count = -(-inputs // rows)

    def step(number: Any, carry: Any) -> Any:
        following = load(number + 1)
        return added(*carry), *following

    start = jnp.zeros(settings.columns, jnp.float32), *load(jnp.int32(0))
    total = added(*jax.lax.fori_loop(0, count - 1, step, start))
    pltriton.store(y.at[columns], total.astype(y.dtype), mask=inside)


def _probe() -> None:
    """Lowers a small call."""
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((64,), (64, 32)))
    with jax.sharding.use_abstract_mesh(pallas_triton.hopper_mesh()):
        jax.jit(functools.partial(_launched, SETTINGS)).trace(x, w, w).lower(lowering_platforms=("cuda",))
