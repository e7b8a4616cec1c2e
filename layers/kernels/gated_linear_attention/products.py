"""Matrix products with rounded operands and wide sums, forward and backward.

Automatic differentiation of a product with bfloat16 operands and a float32 result multiplies a float32 cotangent by a
bfloat16 operand, which is a slow float32 product; here the cotangent is rounded too.
"""

import functools

import jax
import jax.numpy as jnp


def operand_dtype(*arrays: jax.Array) -> jnp.dtype:
    """bfloat16 if all arrays are, else float32 or wider."""
    dtype = jnp.result_type(*(a.dtype for a in arrays))
    return dtype if dtype == jnp.bfloat16 else jnp.promote_types(dtype, jnp.float32)


def contract(spec: str, a: jax.Array, b: jax.Array, result: jnp.dtype | None = None) -> jax.Array:
    """`einsum` of two arrays of one type, summed in float32 or wider; wide operands are not rounded to TF32."""
    wide = a.dtype != jnp.bfloat16
    return jnp.einsum(
        spec,
        a,
        b,
        precision=jax.lax.Precision.HIGHEST if wide else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.promote_types(a.dtype, jnp.float32) if result is None else result,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def product(spec: str, dtype: jnp.dtype, a: jax.Array, b: jax.Array) -> jax.Array:
    """`contract` of wide arrays after rounding them to `dtype`; no index of an operand may be summed alone."""
    return contract(spec, a.astype(dtype), b.astype(dtype))


def _forward(spec, dtype, a, b):
    rounded = a.astype(dtype), b.astype(dtype)
    return contract(spec, *rounded), rounded


def _backward(spec, dtype, rounded, cotangent):
    a, b = rounded
    left, right, out = spec.replace("->", ",").split(",")
    cotangent = cotangent.astype(dtype)
    return contract(f"{out},{right}->{left}", cotangent, b), contract(f"{left},{out}->{right}", a, cotangent)


product.defvjp(_forward, _backward)
