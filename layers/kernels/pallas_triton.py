"""Pallas's Triton backend: whether it is available, and how kernels are launched.

JAX calls it deprecated, so kernels reach it only through this module. Where the version of JAX cannot build a kernel, or the
device cannot run it, `refusal` gives the reason, and the call falls back to XLA.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

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
