"""Softmax attention whose queries and keys meet through the Householder transforms of the tokens between them.

With H_s = I - beta_s w_s w_s^T the logit of query i and key j <= i is scale q_i^T H_i H_{i-1} ... H_{j+1} k_j. Time is cut into
chunks. Within one, products of transforms are a triangular system (the UT transform); between chunks, queries go back through one
matrix per chunk. Nothing that grows with t^2 is in memory.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels.attention.pieces import Piece, Results, merged
from layers.parts.blocks import in_blocks
from layers.typing import Array, Float, Int

_HIGHEST = jax.lax.Precision.HIGHEST


class Path(NamedTuple):
    """What `path_attention` returns, all float32.

    Attributes:
      piece: attention over the keys of the call.
      queries: the queries as they meet keys from before the call, (b, t, h, k).
      keys: the keys as queries after the call meet them, (b, t, g, k).
      transform: the product of all transforms, the first token's rightmost: (b, g, k, k).
    """

    piece: Piece
    queries: jax.Array
    keys: jax.Array
    transform: jax.Array


def path_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t g v"],
    w: Float[Array, "b t g k"],
    beta: Float[Array, "b t g"],
    numbers: Int[Array, "b t"],
    *,
    scale: float,
    chunk: int,
) -> Path:
    """Returns causal attention by accumulated Householder transforms.

    Args:
      q, k, v: queries, keys and values; head i reads group i // (h / g).
      w: directions of norm 1.
      beta: strengths from 0 to 2; 0 at padding, whose transform is then the identity.
      numbers: segments; tokens see keys of their own, and 0 is padding.
      scale: factor of the logits.
      chunk: tokens in a chunk.
    """
    b, t, _, size = q.shape
    groups, length = k.shape[2], min(chunk, t)
    q, k, v, w, beta = (
        _in_chunks(x.astype(jnp.float32), length, groups) for x in (q, k, v, w, beta[..., None])
    )
    k, v, w, weighted = k[:, :, :, 0], v[:, :, :, 0], w[:, :, :, 0], (beta * w)[:, :, :, 0]
    numbers = in_blocks(numbers, length)[:, None]
    count, index = numbers.shape[2], jnp.arange(length, dtype=jnp.int32)
    before, until = ((index[None] + one <= index[:, None])[None, None, None] for one in (1, 0))

    system = jnp.where(before, _outer(weighted, w), 0) + _one(length, 5)
    right = jnp.concatenate([weighted, jnp.where(before, _outer(weighted, k), 0)], axis=-1)
    solved = jax.lax.linalg.triangular_solve(system, right, left_side=True, lower=True, unit_diagonal=True)
    directions, crossing = solved[..., :size], solved[..., size:]
    met = jnp.where(until[:, :, :, None], _outer(q, w[:, :, :, None]), 0)
    local = _outer(q, k[:, :, :, None]) - _product(met, crossing[:, :, :, None])
    q = q - _product(met, directions[:, :, :, None])
    k = k - _product(jnp.swapaxes(crossing, -1, -2), w)
    passing = _one(size, 5) - _product(jnp.swapaxes(w, -1, -2), directions)

    def seen(others):
        same = (numbers[..., :, None] == others[..., None, :]) & (numbers != 0)[..., :, None]
        return same[:, :, :, None]

    @jax.checkpoint
    def go_back(carry, distance):
        q, results = carry
        there = jnp.arange(count, dtype=jnp.int32) - distance
        exists = (there >= 0)[None, None, :, None, None, None]
        there = jnp.maximum(there, 0)
        tile = _softmax(
            scale * _outer(q, k[:, :, there][:, :, :, None]),
            seen(numbers[:, :, there]) & exists,
            v[:, :, there][:, :, :, None],
        )
        moved = _product(q, passing[:, :, there][:, :, :, None])
        return (jnp.where(exists, moved, q), merged(results, tile)), None

    first = _softmax(scale * local, seen(numbers) & until[:, :, :, None], v[:, :, :, None])
    (q, results), _ = jax.lax.scan(go_back, (q, first), jnp.arange(1, count, dtype=jnp.int32))

    def collect(after, matrix):
        return _product(after, matrix), after

    last = jnp.broadcast_to(_one(size, 4), (b, groups, size, size))
    transform, after = jax.lax.scan(collect, last, jnp.moveaxis(passing, 2, 0), reverse=True)
    k = _outer(k, jnp.moveaxis(after, 0, 2))
    output, top, rest = (_in_time(x, t) for x in (results.output, *(y[..., None] for y in results[1:])))
    piece = Piece(output, (top + rest)[..., 0])
    return Path(piece, _in_time(q, t), _in_time(k[:, :, :, None], t), transform)


def _in_chunks(x, length, groups):
    """(b, t, h, d) -> (b, g, n, h / g, chunk, d), with zeros behind the last token."""
    x = in_blocks(x, length)
    b, count, _, heads, size = x.shape
    return x.reshape(b, count, length, groups, heads // groups, size).transpose(0, 3, 1, 4, 2, 5)


def _in_time(x, time):
    """The inverse of `_in_chunks`."""
    b, groups, count, heads, length, size = x.shape
    x = x.transpose(0, 2, 4, 1, 3, 5).reshape(b, count * length, groups * heads, size)
    return x[:, :time]


def _softmax(logits, seen, v):
    """The softmax over one chunk of keys."""
    logits = jnp.where(seen, logits, -jnp.inf)
    top = jax.lax.stop_gradient(logits.max(-1))
    weights = jnp.where(seen, jnp.exp(logits - jnp.where(top == -jnp.inf, 0, top)[..., None]), 0)
    total = weights.sum(-1)
    total = jnp.where(total == 0, 1, total)
    return Results(_product(weights / total[..., None], v), top, jnp.log(total))


def _one(size, rank):
    """The unit matrix with leading axes of size 1."""
    return jnp.eye(size, dtype=jnp.float32).reshape(*(1,) * (rank - 2), size, size)


def _outer(x, y):
    return _product(x, jnp.swapaxes(y, -1, -2))


def _product(x, y):
    return jnp.matmul(x, y, precision=_HIGHEST)
