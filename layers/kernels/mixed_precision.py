"""Matrix products with rounded operands and float32 sums, forward and backward.

Elementwise arithmetic of the chunked forms is in float32. The operands of their matrix products are rounded, to bfloat16
where the inputs are bfloat16, and sums stay in float32. Automatic differentiation of a product with rounded operands
would multiply a float32 cotangent by a bfloat16 operand, which is a slow float32 product. Here the cotangent is rounded
too.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from layers.kernels.promotion import joint_dtype, promoting


def operand_dtype(*arrays: jax.Array) -> jnp.dtype:
    """Returns bfloat16 if all arrays are bfloat16, else float32 or wider."""
    dtype = joint_dtype(*(a.dtype for a in arrays))
    return dtype if dtype == jnp.bfloat16 else joint_dtype(dtype, jnp.float32)


def contract(spec: str, a: jax.Array, b: jax.Array, result: DTypeLike | None = None) -> jax.Array:
    """`einsum` of two arrays of one type, with sums in float32 or wider; float32 operands are not rounded to TF32.

    If both operands begin with an ellipsis, as in "...ij,...jk->...ik", it stands for the same axes in both.
    """
    wide = a.dtype != jnp.bfloat16
    stacked = spec.count("...") == 3
    out = jnp.einsum(
        spec,
        _fold(a) if stacked else a,
        _fold(b) if stacked else b,
        precision=jax.lax.Precision.HIGHEST if wide else jax.lax.Precision.DEFAULT,
        preferred_element_type=joint_dtype(a.dtype, jnp.float32) if result is None else result,
    )
    return out.reshape(*a.shape[:-2], *out.shape[-2:]) if stacked else out


def _fold(x):
    """Merges the third axis and those after it, except the last two: XLA on a CPU aborts on products of rank 8.

    The axes that are sharded over devices, batch and heads, stay separate or come first among the merged ones.
    """
    return x.reshape(*x.shape[:2], -1, *x.shape[-2:]) if x.ndim > 5 else x


def product(
    spec: str, a: jax.Array, b: jax.Array, dtype: DTypeLike, result: DTypeLike | None = None
) -> jax.Array:
    """`contract` of two arrays after rounding them.

    Args:
      spec: as for `contract`; every index that is summed occurs in both operands.
      a, b: the operands; their cotangents have their types.
      dtype: type that operands, and cotangents as operands, are rounded to.
      result: type of the result; float32 or wider if None.
    """
    return _product(spec, dtype, result or joint_dtype(jnp.float32, dtype), a.dtype, b.dtype, a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _product(spec, dtype, result, a_dtype, b_dtype, a, b):  # noqa: ARG001 - the types are for the backward pass
    return contract(spec, a.astype(dtype), b.astype(dtype)).astype(result)


def _forward(spec, dtype, result, a_dtype, b_dtype, a, b):  # noqa: ARG001
    a, b = a.astype(dtype), b.astype(dtype)
    return contract(spec, a, b).astype(result), (a, b)


def _backward(spec, dtype, result, a_dtype, b_dtype, operands, cotangent):  # noqa: ARG001
    a, b = operands
    cotangent = cotangent.astype(dtype)
    left, right, out = spec.replace("->", ",").split(",")
    return (
        contract(f"{out},{right}->{left}", cotangent, b).astype(a_dtype),
        contract(f"{left},{out}->{right}", a, cotangent).astype(b_dtype),
    )


_product.defvjp(promoting(_forward), promoting(_backward))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def solve(lower: jax.Array, inverse: jax.Array, right: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Returns y with (I + lower) y = right, in the type of `right`, given the inverse of I + lower.

    Differentiable in `lower`, which is strictly lower triangular, and in `right`, but not through `inverse`.
    """
    return _solve_forward(lower, inverse, right, dtype)[0]


def _solve_forward(lower, inverse, right, dtype):  # noqa: ARG001 - its gradient needs only the inverse
    y = product("...ij,...jk->...ik", inverse, right, dtype, right.dtype)
    return y, (inverse, y)


def _solve_backward(dtype, residuals, cotangent):
    inverse, y = residuals
    dright = product("...ji,...jk->...ik", inverse, cotangent, dtype, y.dtype)
    dlower = -product("...ik,...jk->...ij", dright, y, dtype, y.dtype).astype(joint_dtype(jnp.float32, dtype))
    return jnp.tril(dlower, -1), jnp.zeros_like(inverse), dright


solve.defvjp(promoting(_solve_forward), promoting(_solve_backward))
