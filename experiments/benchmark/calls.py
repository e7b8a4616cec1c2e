"""The timed functions: a primitive called with random arrays, forward, and forward with all its gradients."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark.timing import peak_bytes
from experiments.parallel.mesh import cpu
from layers.kernels.suite import Benchmark, Suite
from layers.typing import Array

Arrays = dict[str, Any]
Function = Callable[..., Any]


class Compiled(NamedTuple):
    """Compiled functions of arrays, and of arrays and a cotangent with gradients, and the memory of each."""

    forward: Callable[[Arrays], Any]
    both: Callable[[Arrays, Any], Any]
    forward_peak_bytes: int
    both_peak_bytes: int


@dataclasses.dataclass(frozen=True)
class JaxFunction:
    """A function from arrays by name to the output, for `jax.jit`."""

    run: Function

    def compiled(self, arrays: Arrays, cotangent: np.ndarray) -> Compiled:
        """Returns both passes, compiled."""
        forward = jax.jit(lambda arrays: self.run(**arrays)).lower(arrays).compile()
        both = jax.jit(forward_and_backward(self.run)).lower(arrays, cotangent).compile()
        return Compiled(forward, both, peak_bytes(forward), peak_bytes(both))

    def results(self, arrays: Arrays, cotangent: np.ndarray) -> tuple[Array, Arrays]:
        """Returns the output and the gradients."""
        return jax.jit(forward_and_backward(self.run))(arrays, cotangent)


def draw(benchmark: Benchmark, dtype: str) -> Arrays:
    """Returns the random arguments of a benchmark as host arrays; complex ones in complex64, integers unchanged."""
    seed = zlib.crc32(benchmark.name.encode())
    rng = np.random.Generator(np.random.SFC64(seed))
    arrays = benchmark.draw(rng, benchmark.batch, benchmark.time, 1)

    def cast(array: np.ndarray) -> np.ndarray:
        if np.iscomplexobj(array):
            return array.astype(np.complex64)
        return array.astype(jnp.dtype(dtype)) if array.dtype.kind == "f" else array

    return jax.tree.map(cast, arrays)


def with_implementation(suite: Suite, benchmark: Benchmark, impl: str | None) -> Function:
    """Returns the primitive with the options of the benchmark, as a function from its arrays by name to the output."""
    return functools.partial(_output, suite.function, **benchmark.options, impl=impl)


def _output(function: Function, **arguments: Any) -> Array:
    result = function(**arguments)
    return result[0] if isinstance(result, tuple) else result


def forward_and_backward(function: Function) -> Callable[[Arrays, Array], tuple[Array, Arrays]]:
    """Returns a function from arrays and a cotangent to the output and the gradients of all differentiable arrays."""

    def run(arrays: Arrays, cotangent: Array) -> tuple[Array, Arrays]:
        differentiable, rest = split(arrays)
        output, pullback = jax.vjp(lambda arrays: function(**arrays, **rest), differentiable)
        return output, pullback(cotangent.astype(output.dtype))[0]

    return run


def split(arrays: Mapping[str, Any]) -> tuple[Arrays, Arrays]:
    """Returns the arrays that have gradients, and the others."""
    has_gradient = {
        name: all(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in jax.tree.leaves(a))
        for name, a in arrays.items()
    }
    return (
        {name: a for name, a in arrays.items() if has_gradient[name]},
        {name: a for name, a in arrays.items() if not has_gradient[name]},
    )


def cotangent(function: Function, arrays: Arrays) -> np.ndarray:
    """Returns a random cotangent of the output."""
    shape = jax.eval_shape(lambda arrays: function(**arrays), arrays)
    rng = np.random.Generator(np.random.SFC64(1))
    real = rng.standard_normal(shape.shape, np.float32)
    if jnp.issubdtype(shape.dtype, jnp.complexfloating):
        return (real + 1j * rng.standard_normal(shape.shape, np.float32)).astype(np.complex64)
    return real.astype(shape.dtype)


class Check(NamedTuple):
    """A call with the output and gradients of the float64 reference."""

    arrays: Arrays
    cotangent: np.ndarray
    output: Array
    gradients: Arrays


def check(suite: Suite, benchmark: Benchmark, arrays: Arrays) -> Check:
    """Returns the reference in float64 on these arrays, which are rounded to the benchmark's dtype.

    It runs on the CPU, since it keeps every state and an accelerator's allocator keeps its memory until the process ends.
    """
    reference = with_implementation(suite, benchmark, "reference")
    direction = cotangent(reference, arrays)
    with jax.enable_x64(True), jax.default_device(cpu()):
        wide = jax.tree.map(_widen, arrays)
        return Check(arrays, direction, *jax.jit(forward_and_backward(reference))(wide, _widen(direction)))


def errors(function: Any, expected: Check) -> tuple[float, float]:
    """Returns relative errors of a `JaxFunction` or similar: of the output, and the largest of the gradients.

    The error is ||result - reference|| / ||reference||.
    """
    output, gradients = function.results(expected.arrays, expected.cotangent)
    return (
        _relative(output, expected.output),
        max(_relative(gradients[name], expected.gradients[name]) for name in gradients),
    )


def _widen(array: np.ndarray) -> np.ndarray:
    if np.iscomplexobj(array):
        return array.astype(np.complex128)
    return array.astype(np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array


def _relative(result: Array, expected: Array) -> float:
    wanted = np.asarray(expected)
    return float(np.linalg.norm(_widen(np.asarray(result)) - wanted) / np.linalg.norm(wanted))
