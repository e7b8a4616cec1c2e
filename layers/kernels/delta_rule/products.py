"""Matrix products whose operands, in the backward pass too, are rounded to a chosen type.

All arithmetic of the chunked forms is written in float32; only the operands of matrix products are rounded, to bfloat16
where the inputs are bfloat16, and sums are kept in float32. Automatic differentiation of a product with rounded operands
would multiply a float32 cotangent by a bfloat16 operand, which is a slow float32 product.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(spec: str, a: jax.Array, b: jax.Array, dtype) -> jax.Array:
    """`einsum` of two matrices, such as "ij,jk->ik", over their last two axes; results in the type of `a`."""
    return _einsum(spec, a.astype(dtype), b.astype(dtype), a.dtype)


def _einsum(spec, a, b, result):
    left, right, out = spec.replace("->", ",").split(",")
    precision = jax.lax.Precision.DEFAULT if a.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    return jnp.einsum(
        f"...{left},...{right}->...{out}", a, b, precision=precision, preferred_element_type=result
    )


def _forward(spec, a, b, dtype):
    rounded = a.astype(dtype), b.astype(dtype)
    return _einsum(spec, *rounded, a.dtype), rounded


def _backward(spec, dtype, rounded, cotangent):
    a, b = rounded
    left, right, out = spec.replace("->", ",").split(",")
    result, rounded_cotangent = cotangent.dtype, cotangent.astype(dtype)
    return (
        _einsum(f"{out},{right}->{left}", rounded_cotangent, b, result),
        _einsum(f"{out},{left}->{right}", rounded_cotangent, a, result),
    )


product.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def solve(lower: jax.Array, inverse: jax.Array, right: jax.Array, dtype) -> jax.Array:
    """y with (I + lower) y = right, given the inverse of I + lower; differentiable in `lower` and `right`."""
    return product("ij,jk->ik", inverse, right, dtype)


def _solve_forward(lower, inverse, right, dtype):
    y = product("ij,jk->ik", inverse, right, dtype)
    return y, (inverse, y)


def _solve_backward(dtype, residuals, cotangent):
    inverse, y = residuals
    dright = product("ji,jk->ik", inverse, cotangent, dtype)
    dlower = -product("ik,jk->ij", dright, y, dtype)
    return jnp.tril(dlower, -1), jnp.zeros_like(inverse), dright


solve.defvjp(_solve_forward, _solve_backward)
