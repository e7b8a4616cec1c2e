"""Attention by two rings, of keys and then of values, with whole rows of scores: Ring Self-Attention.

In the first ring the keys visit the devices one after the other, and each device computes the scores of its queries with all
keys, (t / P) x t per head. After a softmax of whole rows the values visit in the second ring and are summed (Li et al. 2021,
arXiv:2105.13120). No partial results are merged, and every product is computed, what a mask hides included; the scores take
b h t^2 / P numbers of memory in float32, where Ring Attention (`ring`) keeps a block of them.

A device sends what it does in Ring Attention: forward its keys and as often its values, P - 1 times b (t / P) g (k + v)
numbers. The backward pass is that of Ring Attention, which needs of the softmax only the maximum and the sum of every row; the
authors keep the scores for it.
"""

import jax.numpy as jnp

from layers.kernels.attention import ring
from layers.kernels.attention.pieces import Results
from layers.kernels.attention.tiles import precision_of, product_of
from layers.kernels.attention.visits import scores, with_gradient
from layers.kernels.checks import accumulation_dtype
from layers.kernels.promotion import joint_dtype


def _forward(plan, q, k, v, arrays, at):
    (b, t, h, _), (s, g) = q.shape, k.shape[1:3]
    shared, dtype = joint_dtype(q, k, v), accumulation_dtype(q, k, v)

    def score(visiting, step, rows):
        here, there = ring.seen(plan, q, visiting, arrays, at, step)
        return rows.at[step].set(scores(plan.options, q, visiting[0], here, there))

    rows = jnp.zeros_like(q, dtype, shape=(plan.hops + 1, b, g, h // g, t, s))
    rows = ring.once_round(plan, ring.visitor(k, None, at), score, rows)
    top = rows.max((0, 5))
    weights = jnp.exp(rows - jnp.where(top == -jnp.inf, 0, top)[None, ..., None])
    total = weights.sum((0, 5))

    def weigh(values, step, found):
        output, spoiled = found
        finite = jnp.isfinite(values)
        # A product would multiply what is hidden by zero, and 0 x NaN is NaN. Rows that see such a number are set at the end.
        added = product_of(
            "bgrqs,bsgv->bgrqv",
            weights[step].astype(shared),
            jnp.where(finite, values, 0).astype(shared),
            precision_of(shared),
        )
        unfit = ~finite.all(-1).swapaxes(1, 2)[:, :, None, None]
        return output + added, spoiled | ((rows[step] != -jnp.inf) & unfit).any(-1)

    zeros = jnp.zeros_like(q, dtype, shape=(b, g, h // g, t, v.shape[3])), jnp.zeros_like(top, bool)
    output, spoiled = ring.once_round(plan, v, weigh, zeros)
    total = jnp.where(total == 0, 1, total)
    output = jnp.where(spoiled[..., None], jnp.nan, output / total[..., None])
    results = output, jnp.where(spoiled, jnp.nan, top), jnp.log(total)
    return Results(*(jnp.moveaxis(x, 3, 1).reshape(b, t, h, *x.shape[4:]) for x in results))


attend = with_gradient(_forward, ring.backward)
