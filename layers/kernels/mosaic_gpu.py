"""Mosaic GPU, the part of Pallas that compiles for Hopper: whether it is available, and how kernels are launched.

Its interface changes between releases of JAX, so kernels reach it only through this module. Where the version of JAX cannot
build a kernel, or the device cannot run it, `refusal` gives the reason, and the call falls back to XLA.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from layers.kernels import devices
from layers.kernels.shard_map_types import vary_as

try:
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    MISSING = next(
        (
            f"jax {jax.__version__} has no jax.experimental.pallas.mosaic_gpu.{name}"
            for name in (
                "kernel",
                "InterpretGPUParams",
                "copy_gmem_to_smem",
                "copy_smem_to_gmem",
                "commit_smem",
                "wgmma",
                "ACC",
                "TilingTransform",
                "SwizzleTransform",
            )
            if not hasattr(plgpu, name)
        ),
        None,
    )
except ImportError as error:  # a build of jax without the GPU dialects
    pl = plgpu = None
    MISSING = f"jax {jax.__version__} cannot import Mosaic GPU: {error}"

LANES = 128  # per warpgroup, which Pallas treats as one thread
SHARED_BYTES = 227 * 1024  # available to a program on Hopper
MAX_GRID = 65535  # programs along every axis of the grid but the last

_interpreted = contextvars.ContextVar("interpreted", default=False)


@contextlib.contextmanager
def interpreted(**params: Any) -> Iterator[None]:
    """Context that runs kernels traced inside in the interpreter, on the CPU, with memory that starts as NaN.

    Args:
      params: fields of `plgpu.InterpretGPUParams`, such as `detect_races=True`.
    """
    with for_interpreter(), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(**params)):
        yield


@contextlib.contextmanager
def for_interpreter() -> Iterator[None]:
    """Context in which kernels are traced as an interpreter needs them, on any device."""
    token = _interpreted.set(True)
    try:
        yield
    finally:
        _interpreted.reset(token)


def is_interpreted() -> bool:
    """Returns whether kernels are traced for the interpreter."""
    return _interpreted.get()


def refusal(probe: Callable[[], Any]) -> str | None:
    """Why a kernel cannot run here, or None.

    Args:
      probe: lowers a small example for platform "cuda"; a module-level function, called once.
    """
    return MISSING or refusal_of_device(probe)


def refusal_of_device(probe: Callable[[], Any]) -> str | None:
    """`refusal` for kernels that do not need Mosaic GPU."""
    if _interpreted.get():
        return None
    return devices.hopper_refusal() or _probe_refusal(probe)


@functools.cache
def _probe_refusal(probe: Callable[[], Any]) -> str | None:
    """Lowers the example in its own thread, where no transformation of the caller is active."""
    with ThreadPoolExecutor(1) as pool:
        try:
            pool.submit(probe).result()
        except Exception as error:  # noqa: BLE001 - whatever a release of jax raises means that XLA must do it
            text = (str(error).splitlines() or [""])[0]
            return f"jax {jax.__version__} cannot build the kernel: {type(error).__name__}: {text[:300]}"
    return None


def launch(
    body: Callable[..., None],
    *,
    name: str,
    grid: Mapping[str, int],
    inputs: Mapping[str, jax.Array | tuple[jax.Array, ...]],
    outputs: Mapping[str, jax.ShapeDtypeStruct | tuple[jax.ShapeDtypeStruct, ...]],
    scratch: Mapping[str, Any],
    barriers: bool = False,
    warpgroups: int | None = None,
) -> dict[str, Any]:
    """Runs a kernel, by default without automatic barriers: `body` fences every buffer that a copy refills.

    Args:
      body: called with one keyword argument per name of `inputs`, `outputs` and `scratch`: refs, or tuples of refs where
        those are tuples.
      grid: sizes by axis name; the last axis runs fastest.
      barriers: whether the compiler puts a warpgroup barrier around every store to shared memory.
      warpgroups: number of warpgroups per program. They run `body` concurrently and are told apart by the axis
        "warpgroup". If None, there is one warpgroup and no such axis.

    Returns:
      The arrays by the names of `outputs`, in tuples where those are tuples.
    """
    flat, structure = jax.tree.flatten((dict(inputs), dict(outputs)))
    flat_outputs, outputs_structure = jax.tree.flatten(dict(outputs))

    def run(*refs: Any, **scratch_refs: Any) -> None:
        given, results = jax.tree.unflatten(structure, refs)
        body(**given, **results, **scratch_refs)

    call = plgpu.kernel(
        run,
        out_type=tuple(flat_outputs),
        scratch_types=dict(scratch),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=not barriers),
        **({} if warpgroups is None else {"num_threads": warpgroups, "thread_name": "warpgroup"}),
    )
    # XLA passes a part of an array, such as one of several packed parameters, where it lies, and Mosaic GPU refuses addresses
    # that are no multiple of 256 bytes. It copies parts behind a barrier.
    arrays = jax.lax.optimization_barrier(flat[: len(flat) - len(flat_outputs)])
    results = [vary_as(result, *arrays) for result in call(*arrays)]
    return jax.tree.unflatten(outputs_structure, results)


def lowered_once(*static: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a function of arrays that runs kernels, so that equal calls, as of a model's layers, are lowered once.

    A kernel takes about a second to lower, and a program would lower it once per layer. Interpreted calls are left alone,
    since JAX could not tell them from compiled ones.

    Args:
      static: names of the arguments that are not arrays, but hashable.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled = jax.jit(function, static_argnames=static)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return (function if _interpreted.get() else compiled)(*args, **kwargs)

        return call

    return decorate


def strided(ref: Any, width: int) -> jax.Array:
    """Loads `width` neighbouring numbers, the same number of neighbours per lane of the warpgroup."""
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=width // LANES)
    return plgpu.load(ref, layout=layout, optimized=False)


def matrices(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory for matrices (the last two axes) of at least 8 x 16 bytes, tiled as matrix units read them."""
    size = jax.numpy.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(8 * size * shape[-1])
    tiles = plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)
    return plgpu.SMEM(shape, dtype, transforms=tiles)


def product(a: Any, b: Any, start: jax.Array | None = None) -> jax.Array:
    """Returns a b, or start + a b, in float32 on the matrix units, after waiting for all of it.

    Args:
      a: (m, k), in shared memory as `matrices`, or in registers in the layout of `in_registers`; m is a multiple of 64.
      b: (k, n), in shared memory.
      start: must not be used elsewhere. The product reuses its registers, and ptxas (12.9, 13.0, 13.5) does not see that
        they change: of two equal expressions, one of `start` and one of the result, it computes only one.
    """
    if _interpreted.get():  # the interpreter takes neither operands in registers nor a starting sum
        left, right = (x if isinstance(x, jax.Array) else plgpu.load(x) for x in (a, b))
        result = jax.numpy.dot(left, right, preferred_element_type=jax.numpy.float32)
        return result if start is None else start + result
    if start is None:

        def run(sums: Any) -> jax.Array:
            plgpu.wgmma(sums, a, b)
            return sums[...]

        result = pl.run_scoped(run, plgpu.ACC((a.shape[0], b.shape[1]), jax.numpy.float32))
    else:
        result = pl.run_state(lambda sums: plgpu.wgmma(sums, a, b))(plgpu.ACC.init(start))
    # The wait does not name the registers of the result, so the compiler could move their use before it.
    return jax.lax.optimization_barrier(result)


def products(*sums: tuple[Any, ...], meanwhile: Callable[[], Any] = lambda: None) -> tuple[Any, ...]:
    """Returns sums of products that run together on the matrix units, and the result of `meanwhile`, computed beside them.

    Args:
      sums: (pairs, start) or (pairs,), with pairs (a, b) and start as for `product`; the results keep this order.
      meanwhile: must read nothing that the products change; its result comes last.
    """
    if _interpreted.get():
        results = []
        for pairs, *start in sums:
            result = start[0] if start else None
            for a, b in pairs:
                result = product(a, b, result)
            results.append(result)
        return *results, meanwhile()

    def run(*totals: Any) -> tuple[Any, ...]:
        for total, (pairs, *start) in zip(totals, sums, strict=True):
            if start:
                total[...] = start[0]
            for a, b in pairs:
                plgpu.wgmma(total, a, b)
        other = meanwhile()
        if jax.tree.leaves(other):  # the barrier keeps them from moving behind the wait
            other = jax.lax.optimization_barrier(other)
        return *(total[...] for total in totals), other

    shapes = ((pairs[0][0].shape[0], pairs[0][1].shape[1]) for pairs, *_ in sums)
    *results, other = pl.run_scoped(run, *(plgpu.ACC(shape, jax.numpy.float32) for shape in shapes))
    return *(jax.lax.optimization_barrier(result) for result in results), other


def exp2(x: jax.Array) -> jax.Array:
    """2^x of a float32 matrix in registers, to 2 units in the last place, with 0 for results below 2^-126."""
    if _interpreted.get():
        return jax.numpy.exp2(x)
    result = plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=result)
    def run(_: Any, x: Any) -> Any:
        return x.exp2(approx=True)

    return run(x)


def sigmoid(x: jax.Array) -> jax.Array:
    """1 / (1 + exp(-x)) of float32 neighbours in registers as of `strided`, to about 1e-6, with 0 for results below 2^-126."""
    if _interpreted.get():
        return jax.nn.sigmoid(x)
    layout = plgpu.Layout.WG_STRIDED(x.shape, vec_size=x.shape[0] // LANES)

    @plgpu.inline_mgpu(
        arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=layout)
    )
    def run(_: Any, x: Any) -> Any:
        above = (x * -1.4426950408889634).exp2(approx=True) + 1.0
        return above._pointwise(above._lift_fast_instr("rcp.approx.ftz.f32"))

    return run(x)


def in_registers(ref: Any) -> jax.Array:
    """A matrix from memory, in the register layout that `product` takes and returns."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)


def along(ref: Any, axis: int) -> jax.Array:
    """A vector from memory, laid out for `spread` along an axis of a matrix in registers."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1 - axis), optimized=False)


def spread(vector: jax.Array, axis: int, shape: tuple[int, int]) -> jax.Array:
    """Repeats a vector, which runs along `axis`, over the other axis of a matrix."""
    return jax.lax.broadcast_in_dim(vector, shape, (axis,))


def indices(shape: tuple[int, int], axis: int) -> jax.Array:
    """The index along an axis of every entry of a matrix in registers."""
    return plgpu.broadcasted_iota(jax.numpy.int32, shape, axis, layout=plgpu.Layout.WGMMA)
