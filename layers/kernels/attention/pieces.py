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


class Results(NamedTuple):
    """What a softmax over some of the keys gives of every query: the output (b, t, h, v), and m and log l (b, t, h).

    m is the maximum of the logits and l the sum of exp(a - m).
    """

    output: jax.Array
    top: jax.Array
    log_total: jax.Array


def merged(first: Results, second: Results) -> Results:
    """Returns the results over the keys of both, as one softmax. Callers stop the gradient of m."""
    first, second = (one._replace(top=jax.lax.stop_gradient(one.top)) for one in (first, second))
    return Results(*_joined(first, second))


def compose(first: Piece, second: Piece) -> Piece:
    """Returns attention over the keys of both, as one softmax. Associative, commutative; the identity is Piece(0, -inf)."""
    output, top, log_total = _joined(first, second)
    return Piece(output, *parts_of_sum(top, log_total))


def _joined(first, second):
    """The output, m and log l of two softmaxes, each an output and two numbers whose sum is a log-sum-exp.

    With L_i these sums and m the larger first number, the weights are w_i = exp(L_i - m), o = (w_1 o_1 + w_2 o_2) / (w_1 + w_2)
    and l = w_1 + w_2.
    """
    outputs, tops, rests = zip(first, second, strict=True)
    fit = (jnp.isfinite(outputs[0]) & jnp.isfinite(outputs[1])).all(-1)
    fit &= ~jnp.isnan(tops[0] + rests[0]) & ~jnp.isnan(tops[1] + rests[1])
    top = jax.lax.stop_gradient(jnp.maximum(*tops))
    finite = jnp.where(top == -jnp.inf, 0, top)
    # Rows that are not finite are left out of the sums, through whose derivatives they would reach others.
    weights = [
        jnp.where(fit, jnp.exp(jnp.where(fit, (one - finite) + rest, 0)), 0)
        for one, rest in zip(tops, rests, strict=True)
    ]
    total = weights[0] + weights[1]
    total = jnp.where(total == 0, 1, total)
    output = sum((weight / total)[..., None] * one for weight, one in zip(weights, outputs, strict=True))
    output = jnp.where(fit[..., None], output, outputs[0] + outputs[1])
    return output, jnp.where(fit, top, jnp.nan), jnp.log(total)


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
