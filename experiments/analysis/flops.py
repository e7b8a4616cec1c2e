"""Floating-point operations of a function, counted on its jaxpr, without running or compiling it.

XLA's own analysis counts the body of a loop once; here the body of a scan counts once per iteration.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# One operation per element of the output, transcendental functions included.
_ELEMENTWISE = frozenset(
    {
        *("add", "add_any", "sub", "mul", "div", "rem", "neg", "abs", "sign", "max", "min", "clamp", "conj"),
        *("floor", "ceil", "round", "nextafter", "pow", "integer_pow", "square", "sqrt", "rsqrt", "cbrt"),
        *("exp", "exp2", "expm1", "log", "log1p", "tanh", "logistic", "sin", "cos", "tan", "sinh", "cosh"),
        *("asin", "acos", "atan", "atan2", "erf", "erfc", "erf_inv", "lgamma", "digamma"),
    }
)
# One operation per element of the input.
_REDUCTIONS = frozenset(
    {
        *("reduce_sum", "reduce_max", "reduce_min", "reduce_prod"),
        *("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"),
    }
)
# Operations on real numbers per operation on complex ones.
_COMPLEX = {"mul": 6, "div": 11, "square": 6}


class Flops(NamedTuple):
    """Numbers of floating-point operations.

    Attributes:
      matrix: operations of matrix products and convolutions; a multiplication with its addition counts as two.
      other: all other operations: elementwise functions, reductions and Fourier transforms.
      exact: whether the counts are exact: False if there is a loop of data-dependent length, whose body counts once.
    """

    matrix: float = 0.0
    other: float = 0.0
    exact: bool = True

    @property
    def total(self) -> float:
        """Total number of operations."""
        return self.matrix + self.other

    def plus(self, more: "Flops", times: float = 1) -> "Flops":
        """Returns the sum of these operations and `times` copies of `more`."""
        return Flops(
            self.matrix + times * more.matrix, self.other + times * more.other, self.exact and more.exact
        )


def count_flops(function: Callable[..., Any], *arguments: Any) -> Flops:
    """Returns the number of operations of `function(*arguments)`.

    Args:
      function: any function that jax.jit accepts; it is only traced.
      arguments: arrays or `jax.ShapeDtypeStruct`.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Any) -> Flops:
    total = Flops()
    for equation in jaxpr.eqns:
        total = total.plus(_of_equation(equation))
    return total


def _of_equation(equation: Any) -> Flops:
    name, params = equation.primitive.name, equation.params
    match name:
        case "scan":
            return Flops().plus(_count(params["jaxpr"].jaxpr), params["length"])
        case "while":
            bodies = Flops().plus(_count(params["body_jaxpr"].jaxpr)).plus(_count(params["cond_jaxpr"].jaxpr))
            return bodies._replace(exact=False)
        case "cond":
            return max((_count(branch.jaxpr) for branch in params["branches"]), key=lambda flops: flops.total)
        case "dot_general":
            return Flops(matrix=_of_product(equation))
        case "ragged_dot_general":
            return Flops(matrix=_of_ragged_product(equation))
        case "conv_general_dilated":
            return Flops(matrix=_of_convolution(equation))
        case "fft":
            return Flops(other=_of_transform(equation))
    if name in ("scatter-add", "scatter-mul"):
        return Flops(other=float(math.prod(equation.invars[2].aval.shape)))
    if name.startswith("reduce_window"):
        window = math.prod(params["window_dimensions"])
        return Flops(other=float(window * math.prod(equation.outvars[0].aval.shape)))
    if inner := list(_inner_jaxprs(params)):
        total = Flops()
        for jaxpr in inner:
            total = total.plus(_count(jaxpr))
        return total
    dtype = equation.outvars[0].aval.dtype
    if not jnp.issubdtype(dtype, jnp.inexact):
        return Flops()
    factor = _COMPLEX.get(name, 2) if jnp.issubdtype(dtype, jnp.complexfloating) else 1
    if name in _ELEMENTWISE:
        return Flops(other=float(factor * math.prod(equation.outvars[0].aval.shape)))
    if name in _REDUCTIONS:
        return Flops(other=float(factor * math.prod(equation.invars[0].aval.shape)))
    return Flops()


def _inner_jaxprs(params: Any) -> Iterator[Any]:
    """Yields the jaxprs among the parameters of a call: jit, checkpoint, custom derivatives and similar."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


def _complex_factor(equation: Any) -> int:
    return 4 if jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.complexfloating) else 1


def _of_product(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    depth = math.prod(left[axis] for axis in contracted)
    return float(2 * _complex_factor(equation) * depth * math.prod(equation.outvars[0].aval.shape))


def _of_ragged_product(equation: Any) -> float:
    """Returns the operations of a ragged product: each row meets only the matrix of its group, also in gradients."""
    left, right = (variable.aval.shape for variable in equation.invars[:2])
    return float(2 * math.prod(left) * right[-1])


def _of_convolution(equation: Any) -> float:
    kernel = equation.invars[1].aval.shape
    out_channels = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    taps = math.prod(kernel) / out_channels
    return float(2 * _complex_factor(equation) * taps * math.prod(equation.outvars[0].aval.shape))


def _of_transform(equation: Any) -> float:
    """Returns 5 n log2 n per complex transform of n numbers, and half of it per real one."""
    size, kind = math.prod(equation.params["fft_lengths"]), equation.params["fft_type"].name
    numbers = (equation.outvars[0] if kind == "IRFFT" else equation.invars[0]).aval.shape
    return (2.5 if "RFFT" in kind else 5.0) * math.prod(numbers) * math.log2(max(size, 2))
