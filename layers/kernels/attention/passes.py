"""The two passes of blocked softmax attention, over the blocks of logits that a schedule visits.

The backward pass recomputes the probabilities from the maximum and the log-sum of every query, whichever keys these come
from. Over some of the keys it therefore gives their part of the gradients of a softmax over more keys, as methods that
divide keys over devices need it. Arrays are blocked as in `tiles`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels.attention import tiles
from layers.kernels.checks import accumulation_dtype


class Rows(NamedTuple):
    """What the backward pass needs of every query; see `rows_of`.

    Attributes:
      top: m, the maximum of the logits; -inf for queries without a gradient, NaN for those whose gradient is not finite.
      log_total: log l, the logarithm of the sum of exp(a - m).
      doutput: do, zero where there is no gradient.
      delta: D = do . o - dL.
    """

    top: jax.Array
    log_total: jax.Array
    doutput: jax.Array
    delta: jax.Array


class Gradients(NamedTuple):
    """Gradients in the type of sums, blocked as what they are of; None of a bias or slopes that are not there."""

    q: Any
    k: Any
    v: Any
    bias: Any
    slopes: Any


def forward(rules, q, k, v, context, steps):
    """Returns the output (b, g, blocks, r, block, v), and m and log l of the log-sum-exp (b, g, blocks, r, block)."""
    q, context, steps = _tied(q, context, steps)
    dtype = accumulation_dtype(q)
    rows = q.shape[:-1]
    # Values that a single query does not see are selected away; many queries see different ones of a block.
    single = rows[2] * rows[4] == 1
    unfit = None if single else jnp.where(jnp.isfinite(v).all(-1), 0, jnp.nan).astype(dtype)

    def step(carry, now):
        old = tuple(tiles.rows(x, now) for x in carry)

        def visit():
            top, total, output = old
            a, _ = tiles.logits(tiles.rows(q, now), tiles.columns(k, now), context, now, rules, unfit)
            vs = tiles.columns(v, now)
            vs = jnp.where((a != -jnp.inf).any((3, 4))[..., None] if single else jnp.isfinite(vs), vs, 0)
            new_top = jnp.maximum(top, a.max(-1))
            finite = jnp.where(new_top == -jnp.inf, 0, new_top)
            p = jnp.exp(a - finite[..., None])
            rescale = jnp.exp(top - finite)
            output = rescale[..., None] * output + tiles.product(
                "bgnrqk,bgnkv->bgnrqv", p.astype(v.dtype), vs, rules
            )
            return new_top, rescale * total + p.sum(-1), output

        new = _unless_hidden(visit, lambda: old, context, now, rules)
        return tuple(tiles.put_rows(x, now, y) for x, y in zip(carry, new, strict=True)), None

    carry = (
        jnp.full_like(q, -jnp.inf, dtype, shape=rows),
        jnp.zeros_like(q, dtype, shape=rows),
        jnp.zeros_like(q, dtype, shape=(*rows, v.shape[-1])),
    )
    (top, total, output), _ = jax.lax.scan(step, carry, steps)
    total = jnp.where(total == 0, 1, total)
    return output / total[..., None], top, jnp.log(total)


def rows_of(output, top, log_total, doutput, dlse) -> Rows:
    """Returns what the backward pass needs, from the results over all keys and their gradients.

    Args:
      output, top, log_total: results of the softmax; any axes before the last of `output`.
      doutput: gradient of the output, in the type of the values, so that its products and `delta` round alike.
      dlse: gradient of the log-sum-exp.
    """
    # Rows that see no key, and NaN in which nobody is interested, have no gradient. A gradient that is not finite stays
    # in its row: the row's probabilities are NaN where it sees a key.
    unwanted = ~(jnp.isfinite(output).all(-1) | (jnp.abs(doutput) > 0).any(-1) | (jnp.abs(dlse) > 0))
    off = (top == -jnp.inf) | unwanted
    top = jnp.where(off, -jnp.inf, jnp.where(jnp.isfinite(doutput).all(-1), top, jnp.nan))
    doutput = jnp.where(off[..., None], 0, _finite(doutput))
    # Rows of p (do . v - D) must sum to dL.
    delta = jnp.where(off, 0, (doutput * jnp.where(off[..., None], 0, output)).sum(-1) - dlse)
    return Rows(top, log_total, doutput, delta)


def backward(rules, q, k, v, context, steps, rows: Rows) -> Gradients:
    """Returns what the logits of these blocks give to the gradients of a softmax with these rows."""
    q, context, steps = _tied(q, context, steps)
    dtype = rows.top.dtype
    off = rows.top == -jnp.inf
    dslopes = None if context.slopes is None else jnp.zeros_like(q, dtype, shape=(q.shape[1], q.shape[3]))

    def step(carry, now):
        dq, dk, dv, dslopes = carry
        old_dq = tiles.rows(dq, now)

        def visit():
            qs, ks, do = tiles.rows(q, now), tiles.columns(k, now), tiles.rows(rows.doutput, now)
            a, capped = tiles.logits(qs, ks, context, now, rules)
            seen = (a != -jnp.inf) & ~tiles.rows(off, now)[..., None]
            shift, log_sum, delta = (
                tiles.rows(x, now)[..., None] for x in (rows.top, rows.log_total, rows.delta)
            )
            p = jnp.where(seen, jnp.exp(a - shift - log_sum), 0)
            dp = tiles.product("bgnrqv,bgnkv->bgnrqk", do, _finite(tiles.columns(v, now)), rules)
            da = jnp.where(seen, p * (dp - delta), 0)
            new_dv = tiles.product("bgnrqk,bgnrqv->bgnkv", p.astype(v.dtype), do, rules)
            dbias, new_dslopes = _outside(da, context, now)
            if rules.logit_cap is not None:
                da = da * (1 - (jnp.where(seen, capped, 0) / rules.logit_cap) ** 2)
            da = (da * rules.scale).astype(q.dtype)
            new_dq = old_dq + tiles.product("bgnrqk,bgnkd->bgnrqd", da, _finite(ks), rules)
            new_dk = tiles.product("bgnrqk,bgnrqd->bgnkd", da, _finite(qs), rules)
            return new_dq, new_dk, new_dv, dbias, new_dslopes

        zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros_like(q, x.dtype, shape=x.shape))
        skip = lambda: (old_dq, *zeros(jax.eval_shape(visit)[1:]))  # noqa: E731
        new_dq, new_dk, new_dv, dbias, new_dslopes = _unless_hidden(visit, skip, context, now, rules)
        dq, dk, dv = (
            tiles.put_rows(dq, now, new_dq),
            tiles.add_columns(dk, now, new_dk),
            tiles.add_columns(dv, now, new_dv),
        )
        return (dq, dk, dv, None if dslopes is None else dslopes + new_dslopes), dbias

    start = tuple(jnp.zeros_like(x, dtype) for x in (q, k, v))
    (dq, dk, dv, dslopes), dbias = jax.lax.scan(step, (*start, dslopes), steps)
    if context.bias is not None:
        # The bias of all steps is a linear function of the bias; its transpose joins their gradients.
        fetch = jax.linear_transpose(
            lambda bias: jax.vmap(lambda now: tiles.bias_columns(bias, now))(steps),
            context.bias.astype(dtype),
        )
        (dbias,) = fetch(dbias)
    if dslopes is not None:
        dslopes = dslopes.reshape(context.slopes.shape)
    return Gradients(dq, dk, dv, dbias, dslopes)


def _tied(q, context, steps):
    """The arguments, of which none is known before the queries are.

    The derivative of a scan over layers computes once, and keeps, what is the same in every layer. Masks that follow from places
    alone would be kept for all steps, t x s numbers in all.
    """
    return jax.lax.optimization_barrier((q, context, steps))


def _finite(x):
    """x, with zeros for what is not finite."""
    return jnp.where(jnp.isfinite(x), x, 0)


def _unless_hidden(visit, skip, context, step, rules):
    """`visit()`, or `skip()` if no query of the step sees a key of it and that was not known before."""
    if not rules.uncertain:
        return visit()
    return jax.lax.cond(tiles.visible(context, step, rules).any(), visit, skip)


def _outside(da, context, now):
    """Gradients of the bias of this step, as it was fetched, and of the slopes (g, r)."""
    b, g, n, r, block, keys = da.shape
    dbias = dslopes = None
    if context.bias is not None:
        shape = jax.eval_shape(tiles.bias_columns, context.bias, now).shape
        dbias = jnp.moveaxis(da, 3, 2).reshape(b, g * r, n, block, keys)
        summed = [axis for axis, size in enumerate(shape) if size != dbias.shape[axis]]
        dbias = dbias.sum(summed, keepdims=True)
    if context.slopes is not None:
        distances = tiles.by_head(jnp.abs(tiles.distances(context, now)), g).astype(da.dtype)
        dslopes = -(da * distances).sum((0, 2, 4, 5))
    return dbias, dslopes
