"""Unit lower triangular systems by matrix products.

(I + L) y = x with L strictly lower triangular is solved by inverting I + L, because every chunk needs the inverse for
several right-hand sides. The inverse grows from the diagonal: once the diagonal blocks of size s are inverted, those of
size 2 s follow from

    [ A    ]^-1   [  A^-1              ]
    [ C  B ]    = [ -B^-1 C A^-1   B^-1 ].

Blocks smaller than BASE are treated inside tiles of BASE x BASE, where the same step is T <- T - T C T with C the entries
of L that join two neighbouring blocks. Nothing runs row by row. Unlike the product of (I + (-L)^(2^i)), this forms no power
of L, which could be large although the inverse is not.
"""

import jax
import jax.numpy as jnp

from layers.kernels.mixed_precision import contract

# Side of the tiles in which smaller blocks are treated: the smallest product that a matrix unit takes.
BASE = 16


def level_mask(size: int, block: int) -> jax.Array:
    """True (size, size) where the row is in an odd block of `block` and the column in the even block before it."""
    index = jnp.arange(size) // block
    return (index[:, None] % 2 == 1) & (index[None, :] == index[:, None] - 1)


def diagonal_blocks(matrix: jax.Array, block: int) -> jax.Array:
    """The blocks on the diagonal of (..., c, c), as (..., c / block, block, block)."""
    starts = range(0, matrix.shape[-1], block)
    return jnp.stack([matrix[..., i : i + block, i : i + block] for i in starts], axis=-3)


def join_blocks(diagonal: jax.Array, below: jax.Array) -> jax.Array:
    """Blocks (..., 2 m, s, s) on the diagonal and (..., m, s, s) below every other one to (..., m, 2 s, 2 s)."""
    first, second = diagonal[..., 0::2, :, :], diagonal[..., 1::2, :, :]
    top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([below, second], axis=-1)], axis=-2)


def inverse(lower: jax.Array) -> jax.Array:
    """(I + lower)^-1 for strictly lower triangular (..., c, c), c a power of two, in the type of `lower`."""

    def product(a, b):
        return contract("...ij,...jk->...ik", a, b)

    size = lower.shape[-1]
    base = min(size, BASE)
    tiles = diagonal_blocks(lower, base)

    def entries(mask):
        return jnp.where(jnp.broadcast_to(mask, tiles.shape), tiles, 0)

    result = jnp.broadcast_to(jnp.eye(base, dtype=lower.dtype), tiles.shape) - entries(level_mask(base, 1))
    block = 2
    while block < base:
        result -= product(product(result, entries(level_mask(base, block))), result)
        block *= 2
    block = base
    while block < size:
        join = jnp.stack(
            [lower[..., i + block : i + 2 * block, i : i + block] for i in range(0, size, 2 * block)], axis=-3
        )
        below = -product(product(result[..., 1::2, :, :], join), result[..., 0::2, :, :])
        result = join_blocks(result, below)
        block *= 2
    return result[..., 0, :, :]
