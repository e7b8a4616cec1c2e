"""Pallas's Triton backend: whether it is available, and how kernels are launched.

JAX calls it deprecated, so kernels reach it only through this module. Where the version of JAX cannot build a kernel, or the
device cannot run it, `refusal` gives the reason, and the call falls back to XLA.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from layers.kernels import mosaic_gpu
from layers.kernels.shard_map_types import vary_alike

try:
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.triton as pltriton

    MISSING = None
except ImportError as error:  # a build of jax without the GPU dialects, or a release without this backend
    pl = pltriton = None
    MISSING = f"jax {jax.__version__} cannot import Pallas's Triton backend: {error}"


# Context that runs kernels traced inside in Pallas's interpreter.
interpreted = mosaic_gpu.for_interpreter


def hopper_mesh(**axes: int) -> jax.sharding.AbstractMesh:
    """Returns an explicit mesh of Hopper GPUs by sizes of its axes; in `jax.sharding.use_abstract_mesh` kernels lower for them."""
    device = jax.sharding.AbstractDevice("NVIDIA H100", 132, "cuda")
    kinds = (jax.sharding.AxisType.Explicit,) * len(axes)
    return jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes), kinds, abstract_device=device)


def refusal(probe: Callable[[], Any]) -> str | None:
    """Why a kernel cannot run here, or None.

    Args:
      probe: lowers a small example for platform "cuda"; a module-level function, called once.
    """
    return MISSING or mosaic_gpu.refusal_of_device(probe)


LANES = 32  # of a warp


def of_lane(x: jax.Array, lane: int) -> jax.Array:
    """Returns in all lanes of a warp what one of them holds.

    Args:
      x: (32,), float32, in a kernel of one warp.
    """
    if mosaic_gpu.is_interpreted():
        return jnp.broadcast_to(x[lane], x.shape)
    return _assembled([f"shfl.sync.idx.b32 $0, $1, {lane}, 0x1f, 0xffffffff;"], [x])


def sums_over_lanes(values: Sequence[jax.Array]) -> jax.Array:
    """Returns the sums over the lanes of a warp of 32 values, in lane l that of value l.

    Lanes exchange half of their summands, then half of those left, until each holds one: 31 exchanges, where sums one by one take
    160. They are one operation of Triton's, whose passes slow down with the square of the number of operations.

    Args:
      values: 32 of (32,), float32, in a kernel of one warp.
    """
    if mosaic_gpu.is_interpreted():
        return jnp.stack(values).sum(1)
    lines, names = ["mov.u32 lane, %laneid;"], [f"${1 + number}" for number in range(LANES)]
    while len(names) > 1:
        half = len(names) // 2
        lines += [f"and.b32 bit, lane, {half};", "setp.ne.u32 upper, bit, 0;"]
        sums = [f"v{half + number}" for number in range(half)]
        for low, high, total in zip(names[:half], names[half:], sums, strict=True):
            lines += [
                f"selp.f32 sent, {low}, {high}, upper;",
                f"selp.f32 {total}, {high}, {low}, upper;",
                f"shfl.sync.bfly.b32 sent, sent, {half}, 0x1f, 0xffffffff;",
                f"add.f32 {total}, {total}, sent;",
            ]
        names = sums
    declared = [".reg .b32 lane, bit;", ".reg .pred upper;", ".reg .f32 sent;", f".reg .f32 v<{LANES}>;"]
    return _assembled(["{", *declared, *lines, f"mov.f32 $0, {names[0]};", "}"], values)


def _assembled(lines: Sequence[str], values: Sequence[jax.Array]) -> jax.Array:
    """Runs lines of PTX on vectors of 32 lanes; $0 is the result, $1 and on are the values, float32."""
    [found] = pltriton.elementwise_inline_asm(
        "\n".join(lines),
        args=values,
        constraints=",".join(["=f", *["f"] * len(values)]),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct((LANES,), jnp.float32)],
    )
    return found


def launch(
    body: Callable[..., None],
    *,
    name: str,
    grid: tuple[int, ...],
    inputs: Mapping[str, jax.Array | None],
    outputs: Mapping[str, jax.ShapeDtypeStruct],
    warps: int = 4,
    stages: int = 2,
) -> dict[str, jax.Array]:
    """Runs a kernel, in the interpreter inside `interpreted`.

    Args:
      body: called with one keyword argument per name of `inputs` and `outputs`: refs of whole arrays, or None.
      grid: numbers of programs, at most three; the first axis runs fastest.
      warps: number of warps per program.
      stages: iterations of a loop whose loads are in flight.

    Returns:
      The arrays by the names of `outputs`.
    """
    given = {name: x for name, x in inputs.items() if x is not None}
    absent = dict.fromkeys(inputs.keys() - given.keys())
    arrays = vary_alike(list(given.values()))
    varying = jax.typeof(arrays[0]).manual_axis_type

    def run(*refs: Any) -> None:
        body(**dict(zip([*given, *outputs], refs, strict=True)), **absent)

    call = pl.pallas_call(
        run,
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying) for x in outputs.values()
        ],
        grid=grid,
        name=name,
        interpret=mosaic_gpu.is_interpreted(),
        compiler_params=pltriton.CompilerParams(num_warps=warps, num_stages=stages),
    )
    return dict(zip(outputs, call(*arrays), strict=True))
