"""Visits by cuDNN's kernels: attention to the keys of one part of time, where a part is wholly seen, half of it, or none.

Queries and keys of a visit are the tokens of one device each, equally many and in order. Without a mask a query sees all keys.
Under the causal mask contiguous parts see each other by index if they are the same, and otherwise all of the earlier one and
none of the later one. In zig-zag order every part has an early half and a late one, and the halves of a part enclose those of
all further parts: a part sees the early half of one that is further out, and its late half sees all of one further in. So
every kernel call has no mask or the causal one by index, and in zig-zag order all visits but the own take equally long.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels import devices
from layers.kernels.attention import cudnn
from layers.kernels.attention.options import Options, Places
from layers.kernels.attention.pieces import Results
from layers.kernels.shard_map_types import vary_as


class FusedRows(NamedTuple):
    """What the backward pass needs of every query, of the softmax over all keys.

    Attributes:
      output: (b, t, h, v).
      lse: log-sum-exp of the logits (b, t, h).
      doutput: gradient of the output.
    """

    output: jax.Array
    lse: jax.Array
    doutput: jax.Array


def refusal(q: jax.Array, k: jax.Array, v: jax.Array, options: Options, order: str, parts: int) -> str | None:
    """Returns why the kernels cannot take the visits of these arrays, divided into `parts` over time, or None."""
    if devices.assumed():
        return "they cannot be traced where they are not installed"
    if options.segment_ids is not None or options.mask.window is not None:
        return "they know no segments and no window over parts of time"
    if q.shape[1] != k.shape[1]:
        return f"there are {q.shape[1]} queries and {k.shape[1]} keys"
    length = q.shape[1] // parts
    if length % (4 if order == "zigzag" else 2):
        return f"a device has {length} tokens, of which their gradients need an even number in every piece"
    return cudnn.refuses_on_device(q, k, v, options)


def attended(plan: Any, q: jax.Array, k: jax.Array, v: jax.Array, at: Places) -> Results:
    """Returns the results over these keys alone."""

    def run(q, k, causal):
        output, lse = cudnn.forward(_static(plan, q, causal), q, k, v[:, : k.shape[1]], None, None)
        return vary_as(output.astype(jnp.float32), q), vary_as(jnp.moveaxis(lse, 1, 2), q)

    def seen(q, k):
        return run(q, k, False)

    def nothing():
        return jnp.zeros_like(v, jnp.float32, shape=(*q.shape[:3], v.shape[3])), _like_rows(q, -jnp.inf)

    def late():
        half = q.shape[1] // 2
        return tuple(
            jnp.concatenate([x[:, :half], y], axis=1)
            for x, y in zip(nothing(), seen(q[:, half:], k), strict=True)
        )

    output, lse = _by_place(
        plan,
        at,
        whole=lambda: seen(q, k),
        own=lambda: run(q, k, True),
        early=lambda: seen(q, k[:, : k.shape[1] // 2]),
        late=late,
        nothing=nothing,
    )
    return Results(output, lse, jnp.zeros_like(lse))


def rows_of(q: jax.Array, results: Results, doutput: jax.Array) -> FusedRows:
    """Returns what `gradients` needs, from the results over all keys."""
    return FusedRows(results.output.astype(q.dtype), results.top + results.log_total, doutput.astype(q.dtype))


def gradients(
    plan: Any, q: jax.Array, k: jax.Array, v: jax.Array, at: Places, rows: FusedRows
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns what these keys give to the gradients of q, k and v, in float32."""

    def run(q, k, v, rows, causal=False):
        lse = jnp.moveaxis(rows.lse, 2, 1)
        found = cudnn.backward(_static(plan, q, causal), q, k, v, None, None, lse, rows.output, rows.doutput)
        return tuple(vary_as(x.astype(jnp.float32), q) for x in found)

    def nothing():
        return tuple(jnp.zeros_like(x, jnp.float32) for x in (q, k, v))

    half = q.shape[1] // 2

    def early():
        dq, *of_keys = run(q, k[:, :half], v[:, :half], rows)
        return dq, *(jnp.pad(x, ((0, 0), (0, half), (0, 0), (0, 0))) for x in of_keys)

    def late():
        dq, dk, dv = run(q[:, half:], k, v, jax.tree.map(lambda x: x[:, half:], rows))
        return jnp.pad(dq, ((0, 0), (half, 0), (0, 0), (0, 0))), dk, dv

    return _by_place(
        plan,
        at,
        whole=lambda: run(q, k, v, rows),
        own=lambda: run(q, k, v, rows, causal=True),
        early=early,
        late=late,
        nothing=nothing,
    )


def _by_place(plan, at, *, whole, own, early, late, nothing):
    """What one of the functions returns, by where the first key and the first query stand."""
    if not plan.options.causal:
        return whole()
    first_key, first_query = at.kv_positions[0, 0], at.q_positions[0, 0]
    before, after = (early, late) if plan.order == "zigzag" else (whole, nothing)
    return jax.lax.switch(1 + jnp.sign(first_key - first_query), (before, own, after))


def _static(plan, q, causal):
    scale = 1 / math.sqrt(q.shape[3]) if plan.options.scale is None else plan.options.scale
    return float(scale), causal, None


def _like_rows(q, value):
    """Rows (b, t, h) of one value, in float32."""
    return jnp.zeros_like(q, jnp.float32, shape=q.shape[:3]) + value
