"""Keys that every query sees, and queries that see every key, beside a window or lists of blocks.

Both are few, so they are gathered: the global keys are one more part of the softmax, left out of the other part, and the
rows of the global queries replace those of the pattern. The cost is that of n columns and n rows of logits.
"""

import dataclasses
import math

import jax.numpy as jnp

from layers.kernels.attention.options import Mask, Options, Places, Tokens
from layers.kernels.attention.pieces import Results, merged
from layers.kernels.attention.schedule import distinct


def with_global_tokens(attend, q, k, v, o: Options, at: Places) -> Results:
    """Returns attend(q, k, v, options, places, aside), to which the options of global tokens are added.

    `attend` knows neither global keys nor queries, and leaves out the keys of `aside` (b|1, h|1, s).
    """
    keys, queries = o.mask.global_keys, o.mask.global_queries
    # Everything else hides by position and segment alone, which `at` tells.
    rest = o._replace(
        mask=Mask(prefix_lengths=o.mask.prefix_lengths),
        segment_ids=None,
        tokens=Tokens(q_positions=at.q_positions, kv_positions=at.kv_positions),
    )
    o = o._replace(mask=dataclasses.replace(o.mask, global_keys=None, global_queries=None))
    if keys is None:
        results = attend(q, k, v, o, at, None)
    else:
        keys = _existing(keys, k.shape[1])
        results = merged(
            attend(q, k, v, o, at, _marked(keys, k.shape[1])), _columns(attend, q, k, v, rest, at, keys)
        )
    if queries is not None:
        queries = _existing(queries, q.shape[1])
        results = _replaced(results, _rows(attend, q, k, v, rest, at, queries), queries)
    return results


def _existing(indices, length):
    """The indices in order, each once, and -1 for those of no token."""
    return distinct(jnp.where(indices < length, indices, -1))


def _marked(indices, length):
    """Whether each of `length` tokens is among the indices (..., n)."""
    return _placed(indices, jnp.ones_like(indices), length) > 0


def _placed(indices, values, length):
    """Integers (..., length) that hold the values (..., n), all positive, at the indices, and 0 elsewhere."""
    shape, rows = indices.shape[:-1], math.prod(indices.shape[:-1])
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    indices = jnp.where(indices < 0, length, indices).reshape(rows, indices.shape[-1])
    placed = jnp.zeros((rows, length + 1), jnp.int32).at[row, indices].set(values.reshape(indices.shape))
    return placed[:, :length].reshape(*shape, length)


def _columns(attend, q, k, v, o, at: Places, indices) -> Results:
    """The results over the keys at the indices (b|1, h|1, n)."""
    batch, heads, groups = q.shape[0], indices.shape[1], k.shape[2]
    indices = jnp.broadcast_to(indices, (batch, *indices.shape[1:]))
    there, exists = jnp.maximum(indices, 0), indices >= 0
    if heads == 1:
        k, v = (jnp.take_along_axis(x, there[:, 0, :, None, None], axis=1) for x in (k, v))
    else:
        row = jnp.arange(batch, dtype=jnp.int32)[:, None, None]
        head = jnp.arange(heads, dtype=jnp.int32)[None, None] // (heads // groups)
        k, v = (x[row, jnp.swapaxes(there, 1, 2), head] for x in (k, v))

    def pick(x):
        return jnp.take_along_axis(jnp.broadcast_to(x[:, None], (batch, heads, x.shape[1])), there, axis=2)

    q_segments, kv_segments = _segments(q, at, exists if at.q_segments is None else pick(at.kv_segments))
    at = Places(at.q_positions, pick(at.kv_positions), q_segments, jnp.where(exists, kv_segments, 0))
    bias = o.logits.bias
    if bias is not None and bias.shape[3] > 1:
        shape = tuple(max(two) for two in zip(bias.shape[:2], there.shape[:2], strict=True))
        bias = jnp.broadcast_to(bias, (*shape, *bias.shape[2:]))
        bias = jnp.take_along_axis(
            bias, jnp.broadcast_to(there, (*shape, there.shape[2]))[:, :, None], axis=3
        )
    return attend(q, k, v, o._replace(logits=dataclasses.replace(o.logits, bias=bias)), at, None)


def _rows(attend, q, k, v, o, at: Places, indices) -> Results:
    """The results of the queries at the indices (b|1, n)."""
    indices = jnp.broadcast_to(indices, (q.shape[0], indices.shape[1]))
    there, exists = jnp.maximum(indices, 0), indices >= 0

    def pick(x):
        return jnp.take_along_axis(jnp.broadcast_to(x, (q.shape[0], x.shape[1])), there, axis=1)

    q_segments = exists if at.q_segments is None else jnp.where(exists, pick(at.q_segments), 0)
    kv_segments = jnp.ones(k.shape[:2], jnp.int32) if at.q_segments is None else at.kv_segments
    at = Places(pick(at.q_positions), at.kv_positions, q_segments.astype(kv_segments.dtype), kv_segments)
    bias = o.logits.bias
    if bias is not None and bias.shape[2] > 1:
        bias = jnp.broadcast_to(bias, (q.shape[0], *bias.shape[1:]))
        bias = jnp.take_along_axis(bias, there[:, None, :, None], axis=2)
    q = jnp.take_along_axis(q, there[:, :, None, None], axis=1)
    return attend(q, k, v, o._replace(logits=dataclasses.replace(o.logits, bias=bias)), at, None)


def _segments(q, at: Places, kv_segments):
    """Segments of the queries and of these keys, as integers; without segments all are in segment 1."""
    if at.q_segments is not None:
        return at.q_segments, kv_segments
    return jnp.ones(q.shape[:2], jnp.int32), kv_segments.astype(jnp.int32)


def _replaced(results: Results, rows: Results, indices) -> Results:
    """The results with the rows at the indices (b|1, n)."""
    (b, t), n = results.output.shape[:2], indices.shape[1]
    indices = jnp.broadcast_to(indices, (b, n))
    place = _placed(indices, jnp.broadcast_to(jnp.arange(1, n + 1, dtype=jnp.int32)[None], (b, n)), t) - 1

    def one(old, new):
        where = place.reshape(b, t, *[1] * (old.ndim - 2))
        return jnp.where(where >= 0, jnp.take_along_axis(new, jnp.maximum(where, 0), axis=1), old)

    return Results(*map(one, results, rows))
