"""Causal attention in half the rounds of a ring: devices that would wait compute for others, as in DistFlashAttn (LightSeq).

Devices hold contiguous parts of time. In round s, from 0 to floor(P / 2), device p >= s attends with its queries to the keys
of device p - s. In a ring device p < s would wait, since those keys are later ones. It takes the queries of device P - s + p
instead, attends with them to its own keys, which are P - s parts earlier, and returns output and log-sum-exp to their owner,
who merges them (Li et al. 2023, arXiv:2310.03294). A device so computes one part against itself and floor(P / 2) parts,
where contiguous parts in a ring take the last device P - 1, and no token changes its device, as in zig-zag order it does.

Everything is sent straight from the device that holds it, over all distances, and in one round does not depend on the one
before. A device sends keys and values floor(P / 2) times at most, and floor((P - 1) / 2) times its queries and the results
for others. In the backward pass gradients of keys and values return as often as they are sent, and queries travel with the
gradients of their outputs. Rounds are unrolled.
"""

from typing import Any

import jax
import jax.numpy as jnp

from layers.kernels.attention.options import Options, Places
from layers.kernels.attention.pieces import merged
from layers.kernels.attention.ring import device, indices
from layers.kernels.attention.visits import (
    Arrays,
    attended,
    gradients,
    in_types_of,
    of_no_keys,
    rows_of,
    with_gradient,
)
from layers.kernels.partition import SEQUENCE_AXIS


def takes(options: Options, q, k) -> bool:
    """Returns whether no query sees a later index, and nothing that belongs to a query is divided with it."""
    given = any(x is not None for x in vars(options.tokens).values())
    alone = options.mask.prefix_lengths is None and options.logits.bias is None
    return options.causal and alone and not given and q.shape[1] == k.shape[1]


def _forward(plan, q, k, v, arrays, at):
    results = attended(plan, q, k, v, arrays, _places(at, q.shape[1], 0))
    nothing = of_no_keys(q, v)
    for step in _rounds():
        (queries, keys, places), helps = _round(step, q, (k, v), at)
        found = attended(plan, queries, *keys, arrays, places)
        results = merged(results, _chosen(helps, nothing, found))
        if _helping(step):
            helped = device() >= jax.lax.axis_size(SEQUENCE_AXIS) - step
            results = merged(results, _chosen(helped, _returned(found, step, True), nothing))
    return results


def _backward(plan, residuals, cotangents):
    q, k, v, arrays, at, results = residuals
    doutput, _, dlse = cotangents
    rows = rows_of(plan, q, k, v, results, doutput, dlse)
    # What was sent in the forward pass is not kept: without a barrier XLA takes both for one.
    q, k, v, at, rows = jax.lax.optimization_barrier((q, k, v, at, rows))
    found = gradients(plan, q, k, v, arrays, _places(at, q.shape[1], 0), rows)
    dq, dkeys, slopes = found.q, (found.k, found.v), found.slopes
    for step in _rounds():
        ((queries, their), keys, places), helps = _round(step, (q, rows), (k, v), at)
        found = gradients(plan, queries, *keys, arrays, places, their)
        slopes = None if slopes is None else slopes + found.slopes
        of_keys = found.k, found.v
        back = _returned(of_keys, step, False)
        kept = _chosen(helps, of_keys, jax.tree.map(jnp.zeros_like, of_keys))
        dkeys = jax.tree.map(lambda *parts: sum(parts), dkeys, back, kept)
        dq = dq + jnp.where(helps, 0, found.q)
        if _helping(step):
            dq = dq + _returned(found.q, step, True)
    found, kept = Arrays(slopes=slopes), Arrays(slopes=arrays.slopes)
    return in_types_of(dq, q), *in_types_of(dkeys, (k, v)), in_types_of(found, kept), None


attend = with_gradient(_forward, _backward)


def _rounds() -> range:
    """The rounds after that in which every device sees its own keys."""
    return range(1, jax.lax.axis_size(SEQUENCE_AXIS) // 2 + 1)


def _helping(step: int) -> bool:
    """Whether devices compute for others in a round; in the last one of an even number everything is done."""
    return 2 * step < jax.lax.axis_size(SEQUENCE_AXIS)


def _round(step: int, queries: Any, keys: Any, at: Places | None):
    """The queries, keys and places of this device in a round, and whether it computes for another."""
    given = at or Places(None, None, None, None)
    own, there = (_places(at, jax.tree.leaves(queries)[0].shape[1], by) for by in (0, -step))
    helps = device() < (step if _helping(step) else 0)
    coming, positions, segments = _sent((keys, given.kv_positions, given.kv_segments), step, False)
    positions = there.kv_positions if at is None else positions
    if not _helping(step):
        return (queries, coming, own._replace(kv_positions=positions, kv_segments=segments)), helps
    theirs = _sent((queries, given.q_positions, given.q_segments), step, True)
    q_positions = there.q_positions if at is None else theirs[1]
    mine = queries, own.q_positions, own.q_segments
    queries, q_positions, q_segments = _chosen(helps, (theirs[0], q_positions, theirs[2]), mine)
    mine = keys, own.kv_positions, own.kv_segments
    keys, kv_positions, kv_segments = _chosen(helps, mine, (coming, positions, segments))
    return (queries, keys, Places(q_positions, kv_positions, q_segments, kv_segments)), helps


def _places(at: Places | None, length: int, by: int) -> Places:
    """The places of this device's tokens, or those by index of the device `by` places after it."""
    if at is not None:
        return at
    positions = indices("contiguous", device(by), length)[None]
    return Places(positions, positions, None, None)


def _chosen(first: jax.Array, one: Any, other: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(first, x, y), one, other)


def _pairs(step: int, helping: bool) -> list[tuple[int, int]]:
    """The devices that send to another `step` places after them: queries to those who help, or keys to the others."""
    count = jax.lax.axis_size(SEQUENCE_AXIS)
    senders = range(count - step, count) if helping else range(count - step)
    return [(i, (i + step) % count) for i in senders]


def _sent(tree: Any, step: int, helping: bool) -> Any:
    """What the device `step` places before this one sends to it; zeros if it sends nothing."""
    pairs = _pairs(step, helping)
    return jax.tree.map(lambda x: jax.lax.ppermute(x, SEQUENCE_AXIS, pairs), tree)


def _returned(tree: Any, step: int, helping: bool) -> Any:
    """What the device to which this one sent has made of it; zeros if it sent nothing."""
    pairs = [(j, i) for i, j in _pairs(step, helping)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, SEQUENCE_AXIS, pairs), tree)
