"""Arithmetic of a warp as lines of PTX, for kernels of Pallas's Triton backend that hold one number per lane in many vectors.

A pass of Triton 3.9 slows down with the square of the number of operations and more, so that a kernel with hundreds of vectors compiles
slowly where each operation stands alone. JAX 0.11 gives Triton one result per piece of assembly.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from layers.kernels import mosaic_gpu
from layers.kernels.pallas_triton import pltriton

LANES = 32  # of a warp


def of_lanes(x: jax.Array) -> list[jax.Array]:
    """Returns what each lane of a warp holds, in all lanes.

    Args:
      x: (32,), float32, in a kernel of one warp.
    """
    if mosaic_gpu.is_interpreted():
        return [jnp.broadcast_to(x[lane], x.shape) for lane in range(LANES)]
    return [
        _assembled([f"shfl.sync.idx.b32 $0, $1, {lane}, 0x1f, 0xffffffff;"], [x]) for lane in range(LANES)
    ]


def in_one_operation(function: Callable[..., Any], *args: Any) -> Any:
    """Returns function(*args), each result as one operation of Triton.

    Args:
      function: takes and returns trees of (32,), float32; sums, products, powers of two, comparisons with > and selections. What two
        results share is computed twice.
      args: for a kernel of one warp.
    """
    if mosaic_gpu.is_interpreted():
        return function(*args)
    given, tree = jax.tree.flatten(args)
    closed, shapes = jax.make_jaxpr(lambda *flat: function(*tree.unflatten(flat)), return_shape=True)(*given)
    results = []
    for number in range(len(closed.jaxpr.outvars)):
        lines, [found], used = _emitted(closed.jaxpr, [number])
        results.append(_assembled(["{", *lines, f"mov.f32 $0, {found};", "}"], [given[i] for i in used]))
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


_LINES = {
    "mul": "mul.f32 {0}, {1}, {2};",
    "add": "add.f32 {0}, {1}, {2};",
    "add_any": "add.f32 {0}, {1}, {2};",
    "sub": "sub.f32 {0}, {1}, {2};",
    "exp2": "ex2.approx.ftz.f32 {0}, {1};",
    "gt": "setp.gt.f32 {0}, {1}, {2};",
    "select_n": "selp.f32 {0}, {3}, {2}, {1};",
}


def _emitted(jaxpr: Any, results: Sequence[int]) -> tuple[list[str], list[str], list[int]]:
    """Lines of PTX for some results of a jaxpr, the names of these, and the numbers of the inputs that they read, $1 and on."""
    needed, equations = {jaxpr.outvars[number] for number in results}, []
    for equation in reversed(jaxpr.eqns):
        if needed.intersection(equation.outvars):
            equations.append(equation)
            needed.update(x for x in equation.invars if not isinstance(x, jax.extend.core.Literal))
    used = [number for number, x in enumerate(jaxpr.invars) if x in needed]
    names = {jaxpr.invars[number]: f"${1 + place}" for place, number in enumerate(used)}
    lines, counts = [], {"f32": 0, "pred": 0}

    def emit(equations: Any, names: dict[Any, str]) -> Callable[[Any], str]:
        def name_of(x: Any) -> str:
            if isinstance(x, jax.extend.core.Literal):
                return f"0f{np.float32(x.val).view(np.uint32):08X}"
            return names[x]

        for equation in equations:
            operands, [result] = [name_of(x) for x in equation.invars], equation.outvars
            if equation.primitive.name == "jit":
                inner = equation.params["jaxpr"].jaxpr
                names[result] = emit(inner.eqns, dict(zip(inner.invars, operands, strict=True)))(
                    inner.outvars[0]
                )
            elif equation.primitive.name in ("broadcast_in_dim", "convert_element_type"):
                names[result] = operands[0]
            else:
                kind = "pred" if result.aval.dtype == bool else "f32"
                names[result] = f"{kind}_{counts[kind]}"
                counts[kind] += 1
                lines.append(_LINES[equation.primitive.name].format(names[result], *operands))
        return name_of

    name_of = emit(equations[::-1], names)
    declared = [f".reg .{kind} {kind}_<{count}>;" for kind, count in counts.items() if count]
    return declared + lines, [name_of(jaxpr.outvars[number]) for number in results], used


def sums_over_lanes(function: Callable[..., Sequence[jax.Array]], *args: Any) -> jax.Array:
    """Returns the sums over the lanes of a warp of 32 values, in lane l that of value l.

    Lanes exchange half of their summands, then half of those left, until each holds one: 31 exchanges, where sums one by one take
    160.

    Args:
      function: returns the values, (32,), from `args`, as `in_one_operation` takes it.
    """
    if mosaic_gpu.is_interpreted():
        return jnp.stack(function(*args)).sum(1)
    given, tree = jax.tree.flatten(args)
    closed = jax.make_jaxpr(lambda *flat: function(*tree.unflatten(flat)))(*given)
    lines, names, used = _emitted(closed.jaxpr, range(LANES))
    lines += [".reg .b32 lane, bit;", ".reg .pred upper;", ".reg .f32 sent;", f".reg .f32 sum<{LANES}>;"]
    lines += ["mov.u32 lane, %laneid;"]
    while len(names) > 1:
        half = len(names) // 2
        lines += [f"and.b32 bit, lane, {half};", "setp.ne.u32 upper, bit, 0;"]
        sums = [f"sum{half + number}" for number in range(half)]
        for low, high, total in zip(names[:half], names[half:], sums, strict=True):
            lines += [
                f"selp.f32 sent, {low}, {high}, upper;",
                f"selp.f32 {total}, {high}, {low}, upper;",
                f"shfl.sync.bfly.b32 sent, sent, {half}, 0x1f, 0xffffffff;",
                f"add.f32 {total}, {total}, sent;",
            ]
        names = sums
    return _assembled(["{", *lines, f"mov.f32 $0, {names[0]};", "}"], [given[number] for number in used])


def _assembled(lines: Sequence[str], values: Sequence[jax.Array]) -> jax.Array:
    """Runs lines of PTX on vectors of 32 lanes, float32; $0 is the result, $1 and on are the values."""
    [found] = pltriton.elementwise_inline_asm(
        "\n".join(lines),
        args=values,
        constraints=",".join(["=f", *["f"] * len(values)]),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct((LANES,), jnp.float32)],
    )
    return found
