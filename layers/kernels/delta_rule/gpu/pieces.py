"""Time in pieces for the Hopper kernels of `delta_rule`, where rows and heads are too few to fill the GPU.

A piece of the time axis acts on the state that enters it by an affine map per head,

    S' = M S + B.

B is where a walk from a zero state ends, M where a walk without values from the identity ends. Both walks take all pieces
at once. A short scan composes the pieces, and the walk for the outputs takes pieces as rows, each with its own state.
Backward, dS = M^T dS' + C, with C the gradient that a piece's own outputs give to the state that enters it, from a walk with
dS' = 0.

What is local to chunks is computed once. M and the states between pieces are kept for the backward pass: together they are
at most twice the pieces' states, 17 MB if 128 of them have 128 x 128 features, whatever the length. States and M are
float32, and the scan multiplies them as such. Inside the walks of M and of the states, what is added is rounded to bfloat16.

With p pieces the forward pass walks three times over 1 / p of the chunks, the backward pass three times instead of twice,
and each scan takes p steps of small products: one row of 32768 tokens and 8 heads, in 16 pieces, waits for 96 chunks and 16
steps in place of 512 chunks. Segments need no special case: the decay into the first token of a segment is 0, and so is M
after it.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels.delta_rule.gpu import backward as gpu_backward
from layers.kernels.delta_rule.gpu import forward as gpu_forward
from layers.kernels.delta_rule.gpu.tiles import PROCESSORS
from layers.kernels.shard_map_types import vary_as

_FEWEST = 4  # pieces from which the shorter walks outweigh the additional ones


def piece_length(chunks: int, blocks: int, pieces: int | None) -> int:
    """Returns the chunks per piece: all of them, or as many as fill the GPU, but no fewer chunks than there are pieces.

    Args:
      blocks: rows times heads.
      pieces: the number of pieces, if not chosen by that rule.
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
    """The entries of the first piece of every row, of an array (b * pieces, ...)."""
    return _by_piece(x, like.shape[0])[:, 0]


def last(x: jax.Array, like: jax.Array) -> jax.Array:
    """The entries of the last piece of every row, of an array (b * pieces, ...)."""
    return _by_piece(x, like.shape[0])[:, -1]


def _by_piece(x: jax.Array, batch: int) -> jax.Array:
    return x.reshape(batch, -1, *x.shape[1:])


class Walked(NamedTuple):
    """The effect of pieces on a state (h, v, k), S -> S passage + added: both (b * pieces, h, ., k), float32."""

    passages: jax.Array
    added: jax.Array


class Composed(NamedTuple):
    """The effect of all pieces of a row before a piece, S -> S through + added, in order; pieces are rows."""

    through: jax.Array
    added: jax.Array


def walked(
    k: jax.Array, v: jax.Array, vectors: jax.Array, inverse: jax.Array, like: jax.Array, stages: int
) -> Walked:
    """Returns the effect of pieces.

    Args:
      k, v, vectors, inverse, stages: see `gpu_forward.forward`; pieces are their rows.
      like: an array of the shape of the state, (b, h, v, k).
    """
    (_, heads, value_dim, key_dim), rows = like.shape, k.shape[0]

    def walk(v, state):
        state = vary_as(jnp.broadcast_to(state, (rows, heads, *state.shape)), k)
        return gpu_forward.forward(k, v, vectors, inverse, state, 1.0, stages, q=None, keeping=False)["final"]

    added = walk(v, jnp.zeros((value_dim, key_dim), jnp.float32))
    # One after the other: the interpreter cannot run two kernels at once.
    added, k = jax.lax.optimization_barrier((added, k))
    return Walked(walk(None, jnp.eye(key_dim, dtype=jnp.float32)), added)


def entering(
    k: jax.Array, v: jax.Array, vectors: jax.Array, inverse: jax.Array, state: jax.Array, stages: int
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the states that enter pieces, (b * pieces, h, v, k), and the passages; None for one piece.

    Args:
      k, v, vectors, inverse, stages: see `walked`.
      state: (b, h, v, k), float32, the state that enters the first piece.
    """
    batch = state.shape[0]
    if k.shape[0] == batch:
        return state, None
    passages, added = walked(k, v, vectors, inverse, state, stages)
    _, states = jax.lax.scan(_step, state, (_in_order(passages, batch), _in_order(added, batch)), unroll=8)
    return _as_rows_again(states), passages


def _step(state, piece):
    """The state after a piece, and the one before it."""
    passage, added = piece
    return _product(state, passage) + added, state


def _product(state, passage):
    return jnp.matmul(state, passage, precision=jax.lax.Precision.HIGHEST)


def composed(
    passages: jax.Array, added: jax.Array, batch: int, *, reverse: bool = False
) -> tuple[Composed, Composed]:
    """Returns the effect of the pieces before each piece, and that of all pieces of a row, (b, h, ., k).

    Args:
      passages, added: of pieces, as in `Walked`.
      reverse: whether "before" a piece are those after it: gradients of states go that way.
    """

    def step(so_far, piece):
        passage, added = piece
        through, before = so_far
        return (_product(through, passage), _product(before, passage) + added), so_far

    pieces = _in_order(passages, batch), _in_order(added, batch)
    identity = jnp.broadcast_to(jnp.eye(passages.shape[-1], dtype=passages.dtype), pieces[0].shape[1:])
    start = vary_as(identity, passages, added), jnp.zeros_like(pieces[1][0])
    whole, befores = jax.lax.scan(step, start, pieces, reverse=reverse, unroll=8)
    return Composed(*map(_as_rows_again, befores)), Composed(*whole)


def applied(effect: Composed, state: jax.Array) -> jax.Array:
    """Returns the states that pieces see, (b * pieces, h, v, k), where `state` (b, h, v, k) is before them all."""
    pieces = effect.through.shape[0] // state.shape[0]
    return _product(jnp.repeat(state, pieces, axis=0), effect.through) + effect.added


def asked(
    q: jax.Array,
    k: jax.Array,
    do: jax.Array,
    vectors: jax.Array,
    made: dict[str, jax.Array],
    like: jax.Array,
    scale: float,
    stages: int,
) -> jax.Array:
    """Returns the gradients that the outputs of pieces give to the states that enter them, (b * pieces, h, v, k).

    Args:
      q, k, do, vectors, made, scale, stages: see `gpu_backward.chain`; pieces are their rows.
      like: an array of the shape of the state, (b, h, v, k).
    """
    nothing = vary_as(jnp.zeros((q.shape[0], *like.shape[1:]), jnp.float32), do)
    return gpu_backward.chain(q, k, do, vectors, made, nothing, scale, stages, keeping=False)["dstate"]


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
    """Returns the gradients of the states that leave pieces, (b * pieces, h, v, k).

    Args:
      q, k, do, vectors, made, scale, stages: see `asked`.
      passages: what `entering` returned.
      dfinal: (b, h, v, k), float32, the gradient of the state that leaves the last piece.
    """
    if passages is None:
        return dfinal
    batch = dfinal.shape[0]
    own = asked(q, k, do, vectors, made, dfinal, scale, stages)
    pieces = _in_order(passages.mT, batch), _in_order(own, batch)
    _, gradients = jax.lax.scan(_step, dfinal, pieces, reverse=True, unroll=8)
    return _as_rows_again(gradients)


def _in_order(x: jax.Array, batch: int) -> jax.Array:
    """(b * pieces, ...) to (pieces, b, ...)."""
    return jnp.moveaxis(_by_piece(x, batch), 1, 0)


def _as_rows_again(x: jax.Array) -> jax.Array:
    """(pieces, b, ...) to (b * pieces, ...)."""
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])
