"""Attention whose queries and results travel, in opposite directions, while keys and values stay: TokenRing.

In step s device p attends with the queries of device p + s, which arrive from device p + 1, to its own keys and values, and
sends what it finds, output and log-sum-exp, to their owner, who merges it (Wang et al. 2024, arXiv:2412.20501). Links in both
directions are in use, and results of one step are sent while the next computes. In the backward pass queries travel with the
gradients of their outputs, the gradients of queries return, and those of keys and values stay.

Bytes that a device sends forward: P - 1 times b (t / P) h k of queries one way, and as often b (t / P) h (v + 2) of results
the other way. With fewer heads of keys than of queries, a ring of keys and values sends less. Results go to devices at every
distance, which needs links between all; the steps are unrolled, so that compiling takes as long as there are devices.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels.attention.options import Places
from layers.kernels.attention.passes import Rows
from layers.kernels.attention.pieces import merged
from layers.kernels.attention.ring import device, indices, shifted
from layers.kernels.attention.visits import (
    Arrays,
    added,
    attended,
    gradients,
    in_types_of,
    no_gradients,
    of_no_keys,
    rows_of,
    with_bias_of,
    with_gradient,
)


class Visitor(NamedTuple):
    """What travels: queries, their places unless these follow from the device they come from, and rows going backward."""

    q: jax.Array
    positions: Any
    segments: Any
    rows: Rows | None


def _forward(plan, q, k, v, arrays, at):
    visiting, results = _visitor(q, at), of_no_keys(q, v)
    for step in range(plan.hops + 1):
        coming = shifted(visiting, -1) if step < plan.hops else None
        here, places = _seen(plan, visiting, k, arrays, at, step)
        found = attended(plan, visiting.q, k, v, here, places)
        results = merged(results, shifted(found, step) if step else found)
        visiting = coming
    return results


def _backward(plan, residuals, cotangents):
    q, k, v, arrays, at, results = residuals
    doutput, _, dlse = cotangents
    visiting = _visitor(q, at)._replace(rows=rows_of(plan, q, k, v, results, doutput, dlse))
    # What visited in the forward pass is not kept: without a barrier XLA takes both rounds for one.
    visiting = jax.lax.optimization_barrier(visiting)
    sums = no_gradients((k, v), arrays, results.top.dtype)
    dq = jnp.zeros_like(q, results.top.dtype)
    for step in range(plan.hops + 1):
        coming = shifted(visiting, -1) if step < plan.hops else None
        here, places = _seen(plan, visiting, k, arrays, at, step)
        found = gradients(plan, visiting.q, k, v, here, places, visiting.rows)
        sums = added(sums, (found.k, found.v), found, 2, indices(plan.order, device(step), q.shape[1]))
        dq = dq + (shifted(found.q, step) if step else found.q)
        visiting = coming
    dk, dv = in_types_of(sums.tokens, (k, v))
    found, kept = Arrays(sums.bias, sums.slopes), Arrays(arrays.bias, arrays.slopes)
    return in_types_of(dq, q), dk, dv, in_types_of(found, kept), None


attend = with_gradient(_forward, _backward)


def _visitor(q, at):
    return Visitor(q, *((None, None) if at is None else (at.q_positions, at.q_segments)), None)


def _seen(plan, visiting, k, arrays, at, step):
    """The arrays and places for the queries that visit in a step."""
    there = indices(plan.order, device(step), visiting.q.shape[1])
    if at is None:
        here = indices(plan.order, device(), k.shape[1])
        places = Places(there[None], here[None], None, None)
    else:
        places = at._replace(q_positions=visiting.positions, q_segments=visiting.segments)
    return with_bias_of(arrays, 2, there), places
