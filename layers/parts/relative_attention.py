"""`attention` with the slopes or the bias of a relative position; biases are never held whole."""

from typing import Any

import jax
import jax.numpy as jnp

from layers.kernels.attention import attention
from layers.kernels.attention.options import segment_positions
from layers.kernels.segments import segment_numbers
from layers.positions import Position
from layers.segments import SegmentIds
from layers.typing import Array, Float, Int

# Queries whose bias is computed at once: memory is heads x this x keys instead of heads x queries x keys.
BLOCK = 128


def relative_attention(
    position: Position,
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g v"],
    *,
    segment_ids: SegmentIds = None,
    kv_segment_ids: Int[Array, "b s"] | None = None,
    q_positions: Int[Array, "#b t"] | None = None,
    kv_positions: Int[Array, "#b s"] | None = None,
    **options: Any,
) -> Float[Array, "b t h v"]:
    """`layers.kernels.attention.attention`, with what `position` adds to the logits.

    T5 and FIRE add numbers for every query and key. They are computed for a block of queries at a time, and again in
    the backward pass.
    """
    at = {
        "segment_ids": segment_ids,
        "kv_segment_ids": kv_segment_ids,
        "q_positions": q_positions,
        "kv_positions": kv_positions,
    }
    b, t = q.shape[:2]
    if not position.has_bias or q.size == 0:
        return attention(q, k, v, **at, slopes=position.slopes, **options)
    if q_positions is None:
        indices = jnp.arange(t, dtype=jnp.int32)[None]
        q_positions = kv_positions = indices if segment_ids is None else segment_positions(segment_ids)
        segment_ids = kv_segment_ids = None if segment_ids is None else segment_numbers(segment_ids)

    def some(q, segment_ids, q_positions):
        return attention(
            q,
            k,
            v,
            bias=position.bias(q_positions, kv_positions),
            segment_ids=segment_ids,
            kv_segment_ids=kv_segment_ids,
            q_positions=q_positions,
            kv_positions=kv_positions,
            **options,
        )

    if t <= BLOCK:
        return some(q, segment_ids, q_positions)
    if segment_ids is None:
        segment_ids, kv_segment_ids = jnp.ones((b, t), jnp.int32), jnp.ones(k.shape[:2], jnp.int32)

    def cut(x):
        x = jnp.pad(x, [(0, -t % BLOCK if axis == 1 else 0) for axis in range(x.ndim)])
        return jnp.moveaxis(x.reshape(x.shape[0], -1, BLOCK, *x.shape[2:]), 1, 0)

    o = jax.lax.map(lambda block: jax.checkpoint(some)(*block), (cut(q), cut(segment_ids), cut(q_positions)))
    return jnp.moveaxis(o, 0, 1).reshape(b, -1, *o.shape[3:])[:, :t]
