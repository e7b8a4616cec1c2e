"""Matrix products whose operands, in the backward pass too, are rounded to a chosen type.

Elementwise arithmetic of the chunked forms is in float32; the operands of matrix products are rounded, to bfloat16 where
the inputs are bfloat16, and sums are kept in float32. Automatic differentiation of a product with rounded operands would
multiply a float32 cotangent by a bfloat16 operand, which is a slow float32 product.
"""

import functools

import jax
import jax.numpy as jnp


def product(spec: str, a: jax.Array, b: jax.Array, dtype, result=None) -> jax.Array:
    """`einsum` of two matrices, such as "ij,jk->ik", over their last two axes.

    Args:
      spec: as for `einsum`, without the axes in front, which both operands have alike.
      a, b: the operands; cotangents come in their types.
      dtype: what operands, and cotangents as operands, are rounded to.
      result: type of the result; float32 or wider if absent.
    """
    return _product(spec, dtype, result or jnp.result_type(jnp.float32, dtype), a.dtype, b.dtype, a, b)


def einsum(spec: str, a: jax.Array, b: jax.Array, result=None) -> jax.Array:
    """As `product`, of operands of one type, in full precision unless they are bfloat16; differentiated as XLA would."""
    left, right, out = spec.replace("->", ",").split(",")
    precision = jax.lax.Precision.DEFAULT if a.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    wide = jnp.result_type(jnp.float32, a.dtype)
    spec = f"...{left},...{right}->...{out}"
    product = jnp.einsum(spec, _fold(a), _fold(b), precision=precision, preferred_element_type=wide)
    return product.astype(result or wide).reshape(*a.shape[:-2], *product.shape[-2:])


def _fold(x):
    """Makes one axis of the third and those after it but the last two: XLA aborts on a CPU at products of rank 8.

    The axes that parallel devices share out, batch and heads, stay or come first in theirs.
    """
    return x.reshape(*x.shape[:2], -1, *x.shape[-2:]) if x.ndim > 5 else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _product(spec, dtype, result, a_dtype, b_dtype, a, b):  # noqa: ARG001 - the types are for the backward pass
    return einsum(spec, a.astype(dtype), b.astype(dtype), result)


def _forward(spec, dtype, result, a_dtype, b_dtype, a, b):  # noqa: ARG001
    a, b = a.astype(dtype), b.astype(dtype)
    return einsum(spec, a, b, result), (a, b)


def _backward(spec, dtype, result, a_dtype, b_dtype, operands, cotangent):  # noqa: ARG001
    a, b = operands
    cotangent = cotangent.astype(dtype)
    left, right, out = spec.replace("->", ",").split(",")
    return (
        einsum(f"{out},{right}->{left}", cotangent, b, a_dtype),
        einsum(f"{out},{left}->{right}", cotangent, a, b_dtype),
    )


_product.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def solve(lower: jax.Array, inverse: jax.Array, right: jax.Array, dtype) -> jax.Array:
    """y with (I + lower) y = right, in the type of `right`, given the inverse of I + lower.

    Differentiable in `lower`, which is strictly lower triangular, and in `right`; not through `inverse`.
    """
    return _solve_forward(lower, inverse, right, dtype)[0]


def _solve_forward(lower, inverse, right, dtype):  # noqa: ARG001 - its gradient needs only the inverse
    y = product("ij,jk->ik", inverse, right, dtype, right.dtype)
    return y, (inverse, y)


def _solve_backward(dtype, residuals, cotangent):
    inverse, y = residuals
    dright = product("ji,jk->ik", inverse, cotangent, dtype, y.dtype)
    dlower = -product("ik,jk->ij", dright, y, dtype, y.dtype).astype(jnp.result_type(jnp.float32, dtype))
    return jnp.tril(dlower, -1), jnp.zeros_like(inverse), dright


solve.defvjp(_solve_forward, _solve_backward)
