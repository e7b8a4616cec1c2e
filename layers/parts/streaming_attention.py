"""Windowed attention with sinks whose distance is bounded: as if positions were the slots of a cache, or by the window."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

from layers.kernels.attention import Logits, Mask, Tokens, attention_with_lse, compose
from layers.positions import Position
from layers.segments import SegmentIds, Segments
from layers.typing import Array, Float


def streaming_attention(
    position: Position,
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g v"],
    *,
    causal: bool,
    mask: Mask,
    logits: Logits,
    segment_ids: SegmentIds = None,
    tokens: Tokens | None = None,
    distance: Literal["cache", "window"] = "cache",
    **options: Any,
) -> Float[Array, "b t h v"]:
    """Causal attention over a window and the first tokens, no distance of which exceeds those of a short sequence.

    For sinks j outside the window of query i, the distance is

        min(i, sink_tokens + window - 1) - j    "cache": from the last of as many slots (StreamingLLM, arXiv:2309.17453)
        window                                  "window": one distance for all of them (LM-Infinite, arXiv:2308.16137)

    Queries and keys are passed rotated by their true positions; for the sinks, they are rotated back.

    Other arguments are those of `layers.kernels.attention.attention`, which computes each of the two parts. `tokens`, if
    given, has the positions and the segments of the keys.
    """
    window, sink_tokens = mask.window, mask.sink_tokens
    options = {"causal": causal, **options}
    near = attention_with_lse(
        q, k, v, mask=Mask(window=window), logits=logits, segment_ids=segment_ids, tokens=tokens, **options
    )
    if tokens is None:
        segments = Segments.of(segment_ids)
        positions = jnp.arange(q.shape[1], dtype=jnp.int32)[None] if segments is None else segments.positions
        segment_ids = jnp.ones(q.shape[:2], jnp.int32) if segments is None else segments.numbers
        tokens = Tokens(segment_ids, positions, positions)
    q_positions, kv_positions = tokens.q_positions, tokens.kv_positions
    if distance == "window":
        back, sinks = window - q_positions, position.turn(k, -kv_positions)
    else:
        back, sinks = jnp.minimum(q_positions, sink_tokens + window - 1) - q_positions, k
    far = attention_with_lse(
        position.turn(q, back),
        sinks,
        v,
        logits=dataclasses.replace(logits, sink_logits=None),
        segment_ids=segment_ids,
        tokens=Tokens(
            kv_segment_ids=jnp.where(kv_positions < sink_tokens, tokens.kv_segment_ids, 0),
            # Shifted positions make the causal mask keep exactly what has left the window.
            q_positions=q_positions - window,
            kv_positions=kv_positions,
        ),
        **options,
    )
    return compose(near, far).output.astype(v.dtype)
