"""Attention whose keys and values visit the devices one after the other: Ring Attention.

Device p of P holds a part of the queries, keys and values. In step s it attends to the keys and values of device p - s,
which arrive from device p - 1, and merges the results by their log-sum-exp (Liu et al. 2023, arXiv:2310.01889). What the
next step needs is sent while this one computes. The backward pass sends keys and values round again, and with them the
sums of their gradients, which come home in the end: nothing of size t x t is stored.

Under a causal mask the last of contiguous parts sees all keys and the first only its own, so that most devices wait. In
zig-zag order time is cut into 2 P pieces and device p holds pieces p and 2 P - 1 - p: every device then sees equally many
keys in every step. Queries, keys and values come in order and are exchanged for that, and outputs are exchanged back,
each once and between pairs of devices. Visits and blocks that are wholly hidden are skipped, and under a causal
window parts are sent no further than it reaches.

A device sends its keys and values, b (t / P) g (k + v) numbers, P - 1 times forward and P - 1 times backward, and backward
as many sums of gradients, in float32, P times.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels.attention.options import Options, Places
from layers.kernels.attention.pieces import merged
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
from layers.kernels.partition import SEQUENCE_AXIS

# Few hops are one sequence of instructions, in which sends overlap with computations as they stand. More are a loop, so that
# compiling does not take longer with more devices; XLA's CPU client confuses the collectives of a loop with others that run
# at the same time.
MOST_UNROLLED = 8

Order = Literal["contiguous", "zigzag"]


class Plan(NamedTuple):
    """What is known of a call before it runs.

    Attributes:
      options: without arrays.
      order: which tokens a device holds.
      hops: how many devices further keys are sent.
      fused: whether visits are `fused_visits`.
    """

    options: Options
    order: Order
    hops: int
    fused: bool = False


def shifted(tree: Any, by: int = 1) -> Any:
    """Returns what the device `by` places before this one holds."""
    count = jax.lax.axis_size(SEQUENCE_AXIS)
    to = [(i, (i + by) % count) for i in range(count)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, SEQUENCE_AXIS, to), tree)


def device(by: int | jax.Array = 0) -> jax.Array:
    """The number of the device `by` places after this one."""
    return (jax.lax.axis_index(SEQUENCE_AXIS) + by) % jax.lax.axis_size(SEQUENCE_AXIS)


def indices(order: Order, part: jax.Array, length: int) -> jax.Array:
    """The places in their row of the tokens (length,) that device `part` holds."""
    steps = jnp.arange(length, dtype=jnp.int32)
    if order == "contiguous":
        return part * length + steps
    half, count = length // 2, jax.lax.axis_size(SEQUENCE_AXIS)
    return jnp.where(steps < half, part * half + steps, (2 * count - 2 - part) * half + steps)


def to_zigzag(x: jax.Array, axis: int = 1) -> jax.Array:
    """Exchanges contiguous parts of time for those in zig-zag order."""
    first, second = jnp.split(x, 2, axis)
    to_first, to_second = _owners()
    first = jax.lax.ppermute(first, SEQUENCE_AXIS, list(enumerate(to_first)))
    second = jax.lax.ppermute(second, SEQUENCE_AXIS, list(enumerate(to_second)))
    return jnp.concatenate(_swapped_if_odd(first, second), axis)


def from_zigzag(x: jax.Array, axis: int = 1) -> jax.Array:
    """The inverse of `to_zigzag`."""
    first, second = _swapped_if_odd(*jnp.split(x, 2, axis))
    to_first, to_second = _owners()
    first = jax.lax.ppermute(first, SEQUENCE_AXIS, [(j, i) for i, j in enumerate(to_first)])
    second = jax.lax.ppermute(second, SEQUENCE_AXIS, [(j, i) for i, j in enumerate(to_second)])
    return jnp.concatenate([first, second], axis)


def _owners():
    """The devices to which each one's first and second piece go. An even device gets its early piece from the firsts."""
    count = jax.lax.axis_size(SEQUENCE_AXIS)
    owner = [min(piece, 2 * count - 1 - piece) for piece in range(2 * count)]
    return owner[::2], owner[1::2]


def _swapped_if_odd(first, second):
    odd = jax.lax.axis_index(SEQUENCE_AXIS) % 2 == 1
    return jnp.where(odd, second, first), jnp.where(odd, first, second)


def once_round(plan: Plan, visiting: Any, visit: Callable[[Any, Any, Any], Any], found: Any) -> Any:
    """Returns what `visit(visiting, step, found)` makes of `found` once what all devices send has visited."""

    def hop(carry, step):
        visiting, found = carry
        coming = shifted(visiting)
        return coming, visit(visiting, step, found)

    visiting, found = _repeated(hop, (visiting, found), plan.hops)
    return visit(visiting, plan.hops, found)


def _forward(plan, q, k, v, arrays, at):
    def visit(visiting, step, results):
        here, there = seen(plan, q, visiting, arrays, at, step)
        return merged(results, attended(plan, q, *visiting[:2], here, there))

    return once_round(plan, visitor(k, v, at), visit, of_no_keys(q, v))


def backward(plan: Plan, residuals, cotangents):
    """Returns the gradients, as `with_gradient` takes them, from the results alone, whichever way these were computed."""
    q, k, v, arrays, at, results = residuals
    doutput, _, dlse = cotangents
    rows = rows_of(plan, q, k, v, results, doutput, dlse)
    # What visited in the forward pass is not kept: without a barrier XLA takes both rounds for one.
    k, v, at, rows = jax.lax.optimization_barrier((k, v, at, rows))

    def visit(visiting, step, sums):
        here, there = seen(plan, q, visiting, arrays, at, step)
        found = gradients(plan, q, *visiting[:2], here, there, rows)
        sums = added(sums, found.q, found, 3, indices(plan.order, device(-step), k.shape[1]))
        return (found.k, found.v), sums

    def hop(carry, step):
        visiting, travelling, sums = carry
        coming, arrived = shifted(visiting), shifted(travelling)
        own, sums = visit(visiting, step, sums)
        return coming, _sum(arrived, own), sums

    start = visitor(k, v, at), None, no_gradients(q, arrays, results.top.dtype)
    visiting, travelling, sums = _repeated(hop, start, plan.hops)
    own, sums = visit(visiting, plan.hops, sums)
    travelling = _sum(shifted(travelling), own)
    if plan.hops:
        travelling = shifted(travelling, -plan.hops)
    dk, dv = in_types_of(travelling, (k, v))
    found = Arrays(sums.bias, sums.slopes)
    kept = Arrays(arrays.bias, arrays.slopes)
    return in_types_of(sums.tokens, q), dk, dv, in_types_of(found, kept), None


attend = with_gradient(_forward, backward)


def _repeated(hop, carry, hops):
    """What is carried after this many hops; the first may carry None where the others carry sums."""
    first = hops if hops <= MOST_UNROLLED else 1
    for step in range(first):
        carry = hop(carry, step)
    if first == hops:
        return carry
    return jax.lax.scan(lambda carry, step: (hop(carry, step), None), carry, jnp.arange(first, hops))[0]


def _sum(travelling, own):
    return own if travelling is None else jax.tree.map(jnp.add, travelling, own)


def visitor(k, v, at):
    """Returns what travels: keys and values, and their places unless these follow from the device they come from."""
    return k, v, *((None, None) if at is None else (at.kv_positions, at.kv_segments))


def seen(plan, q, visiting, arrays, at, step):
    """Returns the arrays and places for the keys that visit in a step."""
    k, _, kv_positions, kv_segments = visiting
    there = indices(plan.order, device(-step), k.shape[1])
    if at is None:
        here = indices(plan.order, device(), q.shape[1])
        places = Places(here[None], there[None], None, None)
    else:
        places = at._replace(kv_positions=kv_positions, kv_segments=kv_segments)
    return with_bias_of(arrays, 3, there), places
