"""`attention` with the slopes or the bias of a relative position; biases are never materialized in full."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from layers.kernels.attention import Logits, Tokens, attention
from layers.kernels.sizes import in_chunks, known
from layers.segments import SegmentIds, Segments
from layers.typing import Array, Float

# Number of queries whose bias is computed at once: memory is heads x this x keys, not heads x queries x keys.
BLOCK = 128


def relative_attention(
    position: Any,
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g v"],
    *,
    logits: Logits,
    segment_ids: SegmentIds = None,
    tokens: Tokens | None = None,
    **options: Any,
) -> Float[Array, "b t h v"]:
    """Returns `layers.kernels.attention.attention` with the bias that `position` adds to the logits.

    `position` is a `Position`, or what has its `slopes`, `has_bias` and `bias`. T5 and FIRE add a number per query and key. These
    are computed for a block of queries at a time, and recomputed in the backward pass. A bias in `logits` has one query. `tokens`, if given, has the positions and
    the segments of the keys.
    """
    b, t = q.shape[:2]
    if not position.has_bias or q.size == 0:
        logits = dataclasses.replace(logits, slopes=position.slopes)
        return attention(q, k, v, logits=logits, segment_ids=segment_ids, tokens=tokens, **options)
    if tokens is None:
        segments = Segments.of(segment_ids)
        positions = jnp.arange(t, dtype=jnp.int32)[None] if segments is None else segments.positions
        segment_ids = None if segments is None else segments.numbers
        tokens = Tokens(segment_ids, positions, positions)

    def attend(q, segment_ids, q_positions):
        own = position.bias(q_positions, tokens.kv_positions)
        return attention(
            q,
            k,
            v,
            logits=dataclasses.replace(logits, bias=own if logits.bias is None else own + logits.bias),
            segment_ids=segment_ids,
            tokens=dataclasses.replace(tokens, q_positions=q_positions),
            **options,
        )

    if known(t) and t <= BLOCK:
        return attend(q, segment_ids, tokens.q_positions)
    if segment_ids is None:
        segment_ids = jnp.ones((b, t), jnp.int32)
        tokens = dataclasses.replace(tokens, kv_segment_ids=jnp.ones(k.shape[:2], jnp.int32))

    def cut(x):
        padded = in_chunks(t, BLOCK)
        x = jnp.pad(x, [(0, padded - t if axis == 1 else 0) for axis in range(x.ndim)])
        return jnp.moveaxis(x.reshape(x.shape[0], padded // BLOCK, BLOCK, *x.shape[2:]), 1, 0)

    blocks = cut(q), cut(segment_ids), cut(tokens.q_positions)
    o = jax.lax.map(lambda block: jax.checkpoint(attend)(*block), blocks)
    return jnp.moveaxis(o, 0, 1).reshape(b, in_chunks(t, BLOCK), *o.shape[3:])[:, :t]
