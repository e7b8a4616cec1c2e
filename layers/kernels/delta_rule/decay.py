"""Decayed scores inside a chunk, exact for any log-decay.

The score of a row i against an earlier column j is sum_k row_ik column_jk exp(g_{j+1} + ... + g_i). Differences of one
cumulative sum would lose digits after strong decay, and the two exponentials that the score splits into would overflow.
Instead, blocks of 1, 2, 4, ... steps are joined pairwise: a row in the second block of a pair reaches a column in the first
by

    exp(sum of g from the start of the row's block to the row) exp(sum of g after the column to the end of its block),

two factors that are at most 1, from sums of numbers of one sign. A reset of the state is a decay by `RESET`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels.delta_rule.triangular import BASE, join_blocks, level_mask
from layers.kernels.mixed_precision import contract, product
from layers.kernels.promotion import promoting

# Log-decay of a reset: its exponential is exactly 0 in float32 and float64, and sums of it stay finite.
RESET = -1e4


class Sums(NamedTuple):
    """Sums of log-decay inside blocks, before a step and after it, both without the step itself: (..., c, k)."""

    before: jax.Array
    after: jax.Array


def block_sums(log_decay: jax.Array) -> list[Sums]:
    """Returns `Sums` inside blocks of 1, 2, 4, ... steps, the last for the whole chunk."""
    size, width = log_decay.shape[-2:]
    sums = [Sums(jnp.zeros_like(log_decay), jnp.zeros_like(log_decay))]
    for block in _blocks(size):
        shape = (*log_decay.shape[:-2], size // (2 * block), 2, block, width)
        g, before, after = (x.reshape(shape) for x in (log_decay, *sums[-1]))
        total = (before + g)[..., -1:, :]
        first, second = (total[..., i, :, :] for i in (0, 1))
        before = jnp.stack([before[..., 0, :, :], before[..., 1, :, :] + first], axis=-3)
        after = jnp.stack([after[..., 0, :, :] + second, after[..., 1, :, :]], axis=-3)
        sums.append(Sums(before.reshape(log_decay.shape), after.reshape(log_decay.shape)))
    return sums


def scores(erase, query, columns, log_decay, before_decay, dtype):
    """Returns the scores of what a step erases by and reads with, against every column that steps write along.

    Args:
      erase: (..., c, k), read from the state before the step's own column is written: scores for j < i.
      query: (..., c, k), read after it: scores for j <= i.
      columns: a list of (..., c, k).
      log_decay: (..., c, k), or (..., c, 1) if one decay stands for all channels.
      before_decay: whether `erase` reads before the decay of its own step.
      dtype: type of the operands of matrix products.

    Returns:
      The scores (..., c, c) of `erase` per column, those of `query`, and the `Sums` of the whole chunk.
    """
    if log_decay.shape[-1] > 1:
        return _channel_scores(erase, query, columns, log_decay, before_decay, dtype)
    decay = _decay_matrix(log_decay[..., 0], False)
    erase_decay = _decay_matrix(log_decay[..., 0], True) if before_decay else decay
    rows, columns = (jnp.concatenate(x, axis=-2).astype(dtype) for x in ([erase, query], columns))
    blocks = _blocks_of(product("...ik,...jk->...ij", rows, columns, dtype), erase.shape[-2])
    erased, read = [jnp.tril(x * erase_decay, -1) for x in blocks[0]], [x * decay for x in blocks[1]]
    return erased, read, block_sums(log_decay)[-1]


def _blocks_of(matrix, size):
    """(..., m size, n size) as a list of m rows of n blocks."""
    rows, columns = (range(0, count, size) for count in matrix.shape[-2:])
    return [[matrix[..., i : i + size, j : j + size] for j in columns] for i in rows]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _decay_matrix(log_decay, exclusive):
    """exp(sum of log_decay (..., c) after j, up to i or, if exclusive, i - 1), zero for j > i: (..., c, c)."""
    size = log_decay.shape[-1]
    exponent = jnp.zeros((*log_decay.shape, size), log_decay.dtype)
    for block, sums in zip(_blocks(size), block_sums(log_decay[..., None])):
        before, after = (x[..., 0] for x in sums)
        row = before if exclusive else before + log_decay
        mask = jnp.broadcast_to(level_mask(size, block), exponent.shape)
        exponent = jnp.where(mask, row[..., :, None] + after[..., None, :], exponent)
    return jnp.tril(jnp.exp(exponent))


def _decay_matrix_forward(log_decay, exclusive):
    return _decay_matrix(log_decay, exclusive), log_decay


def _decay_matrix_backward(exclusive, log_decay, cotangent):
    # A step's decay is in the exponents of all i after it (or at it) and j before it: the sum over the rows from there on,
    # less the sum over the columns from there on.
    dexponent = jnp.tril(cotangent * _decay_matrix(log_decay, exclusive), -1)
    rows, columns = dexponent.sum(-1), dexponent.sum(-2)
    if exclusive:
        rows = jnp.pad(rows[..., 1:], [(0, 0)] * (rows.ndim - 1) + [(0, 1)])
    return (jax.lax.cumsum(rows - columns, axis=rows.ndim - 1, reverse=True),)


_decay_matrix.defvjp(promoting(_decay_matrix_forward), promoting(_decay_matrix_backward))


def _channel_scores(erase, query, columns, log_decay, before_decay, dtype):
    size, width = log_decay.shape[-2:]
    base = min(size, BASE)
    inside, whole = _inside_tiles(erase, query, columns, log_decay, before_decay, dtype)
    totals = (whole.before + _tiles(log_decay))[..., -1, :]
    joins = []
    *levels, chunk = block_sums(totals)
    for index, sums in enumerate(levels):
        before, after = (x + y[..., None, :] for x, y in zip(whole, sums))
        query_decay = jnp.exp(before + _tiles(log_decay))
        rows = _tiles(erase) * (jnp.exp(before) if before_decay else query_decay), _tiles(query) * query_decay
        earlier = [_tiles(column) * jnp.exp(after) for column in columns]
        block = base * 2**index
        pairs = (*erase.shape[:-2], size // (2 * block), 2, block, width)
        rows, earlier = (
            jnp.concatenate(
                [x.reshape(erase.shape).reshape(pairs)[..., second, :, :] for x in group], axis=-2
            ).astype(dtype)
            for group, second in ((rows, 1), (earlier, 0))
        )
        joins.append(_blocks_of(product("...ik,...jk->...ij", rows, earlier, dtype), block))

    def assemble(row, column):
        matrix = inside[row][column]
        for joined in joins:
            matrix = join_blocks(matrix, joined[row][column])
        return matrix[..., 0, :, :]

    def with_diagonal(matrix, column):
        here = jnp.sum(query * column, axis=-1, keepdims=True)
        return jnp.where(jnp.broadcast_to(jnp.eye(size, dtype=bool), matrix.shape), here, matrix)

    sums = Sums(*((x + y[..., None, :]).reshape(log_decay.shape) for x, y in zip(whole, chunk)))
    count = range(len(columns))
    return (
        [assemble(0, i) for i in count],
        [with_diagonal(assemble(1, i), columns[i]) for i in count],
        sums,
    )


def _inside_tiles(erase, query, columns, log_decay, before_decay, dtype):
    """Scores inside tiles of BASE steps without the diagonal, as rows and columns of `_blocks_of`, and their `Sums`.

    At every level each step has one exponent; the step is a row if in an odd block and a column if in an even one. All
    exponents are sums over steps of a tile, from one product with zeros and ones; adding block by block would write every
    level to memory. The levels form one more axis, and one product gives the scores of all.
    """
    g = _tiles(log_decay)
    base = g.shape[-2]
    steps = jnp.arange(base, dtype=jnp.int32)
    row, step = steps[None, :, None], steps[None, None, :]
    block = jnp.asarray(_blocks(base), jnp.int32)[:, None, None]
    odd, same = row // block % 2 == 1, row // block == step // block
    taken = [step < row, step > row, same & jnp.where(odd, step <= row, step > row)]
    if before_decay:
        taken.append(same & odd & (step < row))
    taken = jnp.concatenate(taken).astype(g.dtype)
    # Zeros made from g are divided over devices as g is.
    flat = taken.reshape(*(1,) * (g.ndim - 2), -1, base) + jnp.zeros_like(g[..., :1, :1])
    sums = contract("...ij,...jk->...ik", flat, g).reshape(*g.shape[:-2], -1, *g.shape[-2:])
    levels = len(_blocks(base))
    decay = jnp.exp(sums[..., 2 : 2 + levels, :, :])
    erase_decay = jnp.exp(sums[..., 2 + levels :, :, :]) if before_decay else decay
    erase, query, *columns = (_tiles(x)[..., None, :, :] for x in (erase, query, *columns))
    rows = jnp.concatenate([erase * erase_decay, query * decay], axis=-2)
    earlier = jnp.concatenate([column * decay for column in columns], axis=-2)
    joined = product("...ik,...jk->...ij", rows.astype(dtype), earlier.astype(dtype), dtype)
    mask = jnp.tile(odd & (step // block == row // block - 1), (1, 2, len(columns)))
    joined = jnp.where(jnp.broadcast_to(mask, joined.shape), joined, 0).sum(-3)
    return _blocks_of(joined, base), Sums(sums[..., 0, :, :], sums[..., 1, :, :])


def _tiles(x):
    """(..., c, k) to (..., c / BASE, BASE, k), or one tile if c is smaller."""
    base = min(x.shape[-2], BASE)
    return x.reshape(*x.shape[:-2], x.shape[-2] // base, base, x.shape[-1])


def _blocks(size):
    """1, 2, 4, ... below `size`."""
    return [2**i for i in range(size.bit_length() - 1)]
