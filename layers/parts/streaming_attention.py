"""Windowed attention with sinks whose distance stops growing, as if positions were the slots of a cache."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from layers.kernels.attention import attention_with_lse, compose
from layers.kernels.attention.options import segment_positions
from layers.kernels.segments import segment_numbers
from layers.positions import Position, rotary
from layers.segments import SegmentIds
from layers.typing import Array, Float, Int


def streaming_attention(
    position: Position,
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g v"],
    *,
    causal: bool,
    window: int,
    sink_tokens: int,
    sink_logits: Float[Array, "h"] | None = None,
    segment_ids: SegmentIds = None,
    kv_segment_ids: Int[Array, "b s"] | None = None,
    q_positions: Int[Array, "#b t"] | None = None,
    kv_positions: Int[Array, "#b s"] | None = None,
    **options: Any,
) -> Float[Array, "b t h v"]:
    """StreamingLLM (Xiao et al. 2023, arXiv:2309.17453): causal attention over a window and the first tokens.

    The distance to sinks outside the window is that from the last slot of a cache of sink_tokens + window tokens,
    min(i, sink_tokens + window - 1) - j, so that no distance exceeds those of a short sequence. Queries and keys come
    turned by their true positions; for the sinks, the queries are turned back.

    Other arguments are those of `layers.kernels.attention.attention`, which gives each of the two parts.
    """
    if q_positions is None:
        indices = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
        q_positions = kv_positions = indices if segment_ids is None else segment_positions(segment_ids)
        near_places = {"segment_ids": segment_ids}
        ids = jnp.ones(q.shape[:2], jnp.int32) if segment_ids is None else segment_numbers(segment_ids)
        segment_ids = kv_segment_ids = ids
    else:
        near_places = {
            "segment_ids": segment_ids,
            "kv_segment_ids": kv_segment_ids,
            "q_positions": q_positions,
            "kv_positions": kv_positions,
        }
    options = {"causal": causal, **options}
    near = attention_with_lse(q, k, v, window=window, sink_logits=sink_logits, **near_places, **options)
    back = jnp.minimum(q_positions, sink_tokens + window - 1) - q_positions
    far = attention_with_lse(
        rotary(q, back, dataclasses.replace(position.config, amplitude=1.0)),
        k,
        v,
        segment_ids=segment_ids,
        kv_segment_ids=jnp.where(kv_positions < sink_tokens, kv_segment_ids, 0),
        # Shifted, causality leaves what has dropped out of the window.
        q_positions=q_positions - window,
        kv_positions=kv_positions,
        **options,
    )
    return compose(near, far).output.astype(v.dtype)
