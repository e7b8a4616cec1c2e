"""Time in pieces for the Hopper kernels of `delta_rule`, where rows and heads are too few to fill the machine.

A piece of the time axis takes the state that enters it through a map that is affine for every head,

    S' = M S + B,

B is where a walk from a zero state ends, M where one without values from the identity does. Both walks take all pieces at
once, a short scan goes from piece to piece, and what follows takes pieces for rows, each with its state. Backward, dS = M^T dS'
+ C, with C the gradient that a piece's own outputs give the state that enters it, from a walk with dS' = 0.

What is per chunk is computed once. M and the states between pieces are kept for the backward pass: together they are no more
than twice the pieces' states, 17 MB if 128 of them have 128 x 128 features, whatever the length. States and M are float32
and the scan multiplies them as such; inside the walks of M, as of the states, what is added to them is rounded to bfloat16.

With `p` pieces the forward pass walks three times over a p-th of the chunks, the backward pass three times instead of
twice, and each scan takes p steps of small products: one row of 32768 tokens and 8 heads, in 16 pieces, waits for 96
chunks and 16 steps in place of 512 chunks. An H200 takes 0.48 ms forward and 1.28 backward, and 1.31 for both passes where
states are kept; in 8 pieces 0.56 and 1.39, in one 1.45 and 3.16, plain JAX 3.99 forward and 8.69 for both passes. Segments
need no care here: the decay into the first token of a segment is 0, and so is M behind it.
"""

import math

import jax
import jax.numpy as jnp

from layers.kernels.delta_rule.gpu import backward as gpu_backward
from layers.kernels.delta_rule.gpu import forward as gpu_forward
from layers.kernels.delta_rule.gpu.tiles import PROCESSORS
from layers.kernels.shard_map_types import vary_as

_FEWEST = 4  # pieces that win more than the walks more lose


def piece_length(chunks: int, blocks: int, pieces: int | None) -> int:
    """Chunks a piece of the time axis: all of them, or as many as fill the machine but not fewer than there are pieces.

    Args:
      blocks: rows times heads.
      pieces: how many, if not by that rule.
    """
    if pieces is None:
        pieces = min(PROCESSORS // blocks, math.isqrt(chunks))
        pieces = pieces if pieces >= _FEWEST else 1
    return -(-chunks // max(1, min(pieces, chunks)))


def as_rows(x: jax.Array, pieces: int) -> jax.Array:
    """(b, t, ...) to (b * pieces, t / pieces, ...)."""
    return x.reshape(x.shape[0] * pieces, -1, *x.shape[2:])


def vectors_as_rows(vectors: jax.Array, pieces: int) -> jax.Array:
    """(b, h, chunks, kinds, c) to (b * pieces, h, chunks / pieces, kinds, c)."""
    if pieces == 1:
        return vectors
    batch, heads, _, *rest = vectors.shape
    vectors = jnp.moveaxis(vectors.reshape(batch, heads, pieces, -1, *rest), 2, 1)
    return vectors.reshape(batch * pieces, heads, -1, *rest)


def first(x: jax.Array, like: jax.Array) -> jax.Array:
    """What belongs to the first piece of every row, of an array (b * pieces, ...)."""
    return _by_piece(x, like.shape[0])[:, 0]


def last(x: jax.Array, like: jax.Array) -> jax.Array:
    """What belongs to the last piece of every row, of an array (b * pieces, ...)."""
    return _by_piece(x, like.shape[0])[:, -1]


def _by_piece(x: jax.Array, batch: int) -> jax.Array:
    return x.reshape(batch, -1, *x.shape[1:])


def entering(
    k: jax.Array, v: jax.Array, vectors: jax.Array, inverse: jax.Array, state: jax.Array, stages: int
) -> tuple[jax.Array, jax.Array | None]:
    """The states that enter pieces, (b * pieces, h, v, k), and M, transposed as they are; None if there is one piece.

    Args:
      k, v, vectors, inverse, stages: see `gpu_forward.forward`; pieces are their rows.
      state: (b, h, v, k), float32, that which enters the first.
    """
    (batch, heads, value_dim, key_dim), rows = state.shape, k.shape[0]
    if rows == batch:
        return state, None

    def walk(v, state):
        state = vary_as(jnp.broadcast_to(state, (rows, heads, *state.shape)), k)
        return gpu_forward.forward(k, v, vectors, inverse, state, 1.0, stages, q=None, keeping=False)["final"]

    added = walk(v, jnp.zeros((value_dim, key_dim), jnp.float32))
    # One after the other: the interpreter cannot run two kernels at once.
    added, k = jax.lax.optimization_barrier((added, k))
    passages = walk(None, jnp.eye(key_dim, dtype=jnp.float32))

    def step(state, piece):
        passage, added = piece
        return jnp.matmul(state, passage, precision=jax.lax.Precision.HIGHEST) + added, state

    _, states = jax.lax.scan(step, state, (_in_order(passages, batch), _in_order(added, batch)), unroll=8)
    return _as_rows_again(states), passages


def leaving(
    q: jax.Array,
    k: jax.Array,
    do: jax.Array,
    vectors: jax.Array,
    made: dict[str, jax.Array],
    passages: jax.Array | None,
    dfinal: jax.Array,
    scale: float,
    stages: int,
) -> jax.Array:
    """The gradients of the states that leave pieces, (b * pieces, h, v, k).

    Args:
      q, k, do, vectors, made, scale, stages: see `gpu_backward.chain`; pieces are their rows.
      passages: what `entering` gave.
      dfinal: (b, h, v, k), float32, that of the state that leaves the last.
    """
    if passages is None:
        return dfinal
    batch = dfinal.shape[0]
    nothing = vary_as(jnp.zeros((q.shape[0], *dfinal.shape[1:]), jnp.float32), do)
    asked = gpu_backward.chain(q, k, do, vectors, made, nothing, scale, stages, keeping=False)["dstate"]

    def step(gradient, piece):
        passage, asked = piece
        through = jnp.matmul(gradient, passage.mT, precision=jax.lax.Precision.HIGHEST)
        return through + asked, gradient

    pieces = _in_order(passages, batch), _in_order(asked, batch)
    _, gradients = jax.lax.scan(step, dfinal, pieces, reverse=True, unroll=8)
    return _as_rows_again(gradients)


def _in_order(x: jax.Array, batch: int) -> jax.Array:
    """(b * pieces, ...) to (pieces, b, ...)."""
    return jnp.moveaxis(_by_piece(x, batch), 1, 0)


def _as_rows_again(x: jax.Array) -> jax.Array:
    """(pieces, b, ...) to (b * pieces, ...)."""
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])
