"""Keys and values by their parts along few directions."""

import jax
import jax.numpy as jnp

from layers.typing import Array, Float


def directions(x: Float[Array, "*b n f"], rank: int) -> Float[Array, "*b f r"]:
    """Returns the orthonormal directions along which rows are largest: the first right singular vectors.

    They are eigenvectors of x^T x, of which x itself is no part in memory.
    """
    x = x.astype(jnp.float32)
    products = jnp.einsum("...nf,...ng->...fg", x, x, precision=jax.lax.Precision.HIGHEST)
    return jnp.linalg.eigh(products)[1][..., ::-1][..., :rank]


def along(x: Float[Array, "*b n f"], basis: Float[Array, "*b f r"]) -> Float[Array, "*b n r"]:
    """Returns the parts of the rows along some directions, float32."""
    return jnp.einsum("...nf,...fr->...nr", x.astype(jnp.float32), basis, precision=jax.lax.Precision.HIGHEST)


def back(parts: Float[Array, "*b n r"], basis: Float[Array, "*b f r"]) -> Float[Array, "*b n f"]:
    """Returns the rows that have these parts along the directions, and none along others."""
    return jnp.einsum("...nr,...fr->...nf", parts, basis, precision=jax.lax.Precision.HIGHEST)
