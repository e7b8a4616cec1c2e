"""Attention over some of the keys, and how pieces over different keys become one softmax."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels import checks


class Piece(NamedTuple):
    """Attention over some of the keys. All parts are float32 or wider.

    Attributes:
      output: (b, t, h, v), 0 in rows that see none of these keys.
      lse: the log-sum-exp of the logits per row, (b, t, h); -inf in rows that see none of these keys.
      lost: what rounding took from `lse`, (b, t, h); it matters where the logits are large, as below a bias of -1e9.
    """

    output: jax.Array
    lse: jax.Array
    lost: jax.Array | float = 0.0


def compose(first: Piece, second: Piece) -> Piece:
    """Returns attention over the keys of both, as one softmax. Associative, commutative; the identity is Piece(0, -inf)."""
    top = jax.lax.stop_gradient(jnp.maximum(first.lse, second.lse))
    finite = jnp.where(top == -jnp.inf, 0, top)
    weights = [jnp.exp((piece.lse - finite) + piece.lost) for piece in (first, second)]
    total = weights[0] + weights[1]
    total = jnp.where(total == 0, 1, total)
    outputs = [
        (weight / total)[..., None] * piece.output
        for weight, piece in zip(weights, (first, second), strict=True)
    ]
    return Piece(outputs[0] + outputs[1], *parts_of_sum(top, jnp.log(total)))


def parts_of_sum(top, rest):
    """Returns top + rest, and what rounding took from the sum (without a gradient, which is all in the sum)."""
    lse = top + rest
    lost = jax.lax.stop_gradient(jnp.where(jnp.isfinite(lse), (top - lse) + rest, 0))
    return lse, lost


def of_no_keys(q, v) -> Piece:
    """The piece of a call without keys."""
    dtype = checks.accumulation_dtype(q, v)
    rows = q.shape[:3]
    return Piece(
        jnp.zeros((*rows, v.shape[3]), dtype), jnp.full(rows, -jnp.inf, dtype), jnp.zeros(rows, dtype)
    )
