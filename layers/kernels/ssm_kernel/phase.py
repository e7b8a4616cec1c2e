"""Angles that are multiplied by large step numbers, as a sum of two floats.

The angle of mode a after l steps, l dt Im(a), reaches 1e5 turns for the fast modes of HiPPO, where float32 loses the
fraction of a turn. An angle per step is therefore held as coarse + fine: `coarse` has 12 significant bits, so that its
product with a step number of up to 12 significant bits is exact, and `fine` is the rest. The cosine and sine of each product
are accurate at any size, and the addition theorems join them.
"""

import jax
import jax.numpy as jnp

COARSE_BITS = 12


def split(angle: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (coarse, fine) with coarse + fine = angle; derivatives go through `fine`."""
    coarse = _coarse(jax.lax.stop_gradient(angle))
    return coarse, angle - coarse


@jax.custom_jvp
def split_product(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (coarse, fine), coarse + fine = x y to about twice the precision of a float; derivatives go through `fine`."""
    x1, y1 = _coarse(x), _coarse(y)
    x2, y2 = x - x1, y - y1
    coarse = _coarse(x * y)
    # x1 y1 and its difference from `coarse` are exact.
    return coarse, ((x1 * y1 - coarse) + (x1 * y2 + x2 * y1)) + x2 * y2


@split_product.defjvp
def _split_product_jvp(primals, tangents):
    (x, y), (dx, dy) = primals, tangents
    coarse, fine = split_product(x, y)
    return (coarse, fine), (jnp.zeros_like(coarse), dx * y + x * dy)


def turn(parts: tuple[jax.Array, jax.Array], steps: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns cosine and sine of (coarse + fine) steps."""
    coarse, fine = (part * steps for part in parts)
    cos, sin = jnp.cos(coarse), jnp.sin(coarse)
    fine_cos, fine_sin = jnp.cos(fine), jnp.sin(fine)
    return cos * fine_cos - sin * fine_sin, sin * fine_cos + cos * fine_sin


def _coarse(v: jax.Array) -> jax.Array:
    return jax.lax.reduce_precision(v, exponent_bits=8, mantissa_bits=COARSE_BITS - 1)
