"""What the Hopper kernels for a decay per key channel share: how a chunk's decays become factors of matrix products.

The score of step i against step j < i is sum_d q_id k_jd exp(g_{j+1,d} + ... + g_id). The sum of g cannot be written as a
difference of sums from the start of the chunk, whose exponentials overflow. It is split at a border between j and i, so that
both factors are at most 1. Write l for the highest bit in which i and j differ. They then lie in two neighbouring blocks of
2^l steps, and the border between the blocks separates them. At level l every step therefore has one exponent: the sum of g
from the border up to the step if it lies in the second block, from the step to the border if it lies in the first.

These sums are a product with a matrix of zeros and ones. It multiplies g as the sum of two bfloat16 matrices, which leaves
an error of 2^-17 of g. The tile X of a level holds decayed queries in second blocks and decayed keys in first blocks, and
its products X X^T hold all the level's scores.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from layers.kernels.gated_linear_attention.gpu.kernels import CHUNK, PART
from layers.kernels.mosaic_gpu import along, in_registers, indices, products, spread

SQUARE = (CHUNK, CHUNK)
LEVELS = CHUNK.bit_length() - 1
# Clamp: exp underflows below this, and -inf would give 0 x inf = NaN.
LOWEST = -100.0

# Rows of `vectors`, one number per step: the segment number, with that of padding equal to none; the number again, with
# that of padding equal to none of the first; whether the step reads the state that enters the chunk, whether it writes the
# state that leaves it, and whether the state passes through the chunk.
ROW, COLUMN, READS, WRITES, KEEPS = range(5)


def vectors(number: jax.Array | None, chunks: int) -> jax.Array | None:
    """Returns the numbers per step that depend on segments, (b, n, 5, c), float32; `number` is (b, t) or None."""
    if number is None:
        return None
    number = jnp.pad(number, ((0, 0), (0, chunks * CHUNK - number.shape[1])))
    number = number.reshape(-1, chunks, CHUNK)
    leaving = jnp.maximum(jax.lax.cummax(number.max(2, keepdims=True), axis=1), 1)
    entering = jnp.pad(leaving, ((0, 0), (1, 0), (0, 0)), constant_values=1)[:, :-1]
    rows = [
        jnp.where(number == 0, -1, number),
        jnp.where(number == 0, -2, number),
        number == entering,
        number == leaving,
        jnp.broadcast_to(entering == leaving, number.shape),
    ]
    return jnp.stack([row.astype(jnp.float32) for row in rows], axis=2)


def second(level: int) -> jax.Array:
    """Which entries of a tile (c, c) lie in rows of second blocks."""
    return (indices(SQUARE, 0) & (1 << level)) != 0


def pairs(level: int) -> jax.Array:
    """The pairs of steps (c, c) that are split at a level, each in both orders."""
    apart = indices(SQUARE, 0) ^ indices(SQUARE, 1)
    return (apart >= 1 << level) & (apart < 2 << level)


def accumulated(join: Callable[[int, Any], Any], start: Any) -> Any:
    """Returns `join(level, result)` over all levels, from `start` on.

    The levels are unrolled. As a loop they leave registers of which ptxas (13.0) takes the products behind the loop for others.
    """
    for level in range(LEVELS):
        start = join(level, start)
    return start


def split(g_tile: Any, high: Any, low: Any) -> None:
    """Writes log-decay to base 2 as the sum of two tiles of bfloat16."""
    g = jnp.maximum(in_registers(g_tile), LOWEST) * math.log2(math.e)
    rounded = g.astype(jnp.bfloat16)
    high[...] = rounded
    low[...] = (g - rounded.astype(jnp.float32)).astype(jnp.bfloat16)


def level_sums(level: int, high: Any, low: Any) -> jax.Array:
    """The exponents of a level, (c, part): sums from the border to the step, or from after the step to the border."""
    step, other = indices(SQUARE, 0), indices(SQUARE, 1)
    between = jnp.where(second(level), step - other, other - step - 1) >= 0
    return _sums(between & ((step ^ other) < 1 << level), high, low)


def sums_before(high: Any, low: Any) -> jax.Array:
    """The exponents from the start of the chunk up to every step."""
    return _sums(indices(SQUARE, 1) <= indices(SQUARE, 0), high, low)


def sums_after(high: Any, low: Any) -> jax.Array:
    """The exponents from after every step to the end of the chunk."""
    return _sums(indices(SQUARE, 1) > indices(SQUARE, 0), high, low)


def _sums(mask: jax.Array, high: Any, low: Any) -> jax.Array:
    return masked_sums(mask, (high, low))


def masked_sums(mask: jax.Array, terms: tuple[Any, ...], start: jax.Array | None = None) -> jax.Array:
    """sum_j mask_ij x_j, with x the sum of `terms`, tiles in shared memory."""
    ones = jnp.where(mask, 1.0, 0.0).astype(jnp.bfloat16)
    added = tuple((ones, term) for term in terms)
    return products((added,) if start is None else (added, start))[0]


def only(vectors: Any, kind: int, x: jax.Array) -> jax.Array:
    """x (c, part) in rows whose flag is set, 0 elsewhere; x if there is one segment and `vectors` None."""
    if vectors is None:
        return x
    flags = spread(along(vectors.at[kind], 0), 0, (CHUNK, PART))
    return jnp.where(flags > 0.0, x, 0.0)


def same(vectors: Any, x: jax.Array) -> jax.Array:
    """x (c, c) for pairs of steps in one segment, 0 elsewhere; x if there is one segment and `vectors` None."""
    if vectors is None:
        return x
    rows = spread(along(vectors.at[ROW], 0), 0, SQUARE)
    return jnp.where(rows == spread(along(vectors.at[COLUMN], 1), 1, SQUARE), x, 0.0)
