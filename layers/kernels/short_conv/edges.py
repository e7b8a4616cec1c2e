"""What the kernels of `short_conv` know of tokens, and the state that they leave, where padding ends the rows."""

import jax
import jax.numpy as jnp

from layers.kernels.segments import Segments


def token_codes(segments: Segments | None, memory: int) -> jax.Array | None:
    """Returns the number of tokens before each one that its taps take, at most `memory`, and -1 at padding.

    The inputs before the first token, zero or a state, belong to its segment.
    """
    if segments is None:
        return None
    counts = jnp.where(segments.numbers == 1, memory, jnp.minimum(segments.positions, memory))
    return jnp.where(segments.real, counts, -1).astype(jnp.int32)


def final_state(x, state, segments, memory):
    """The last `memory` inputs of the last segment, and before them the state or zeros, in float32."""
    batch, time, channels = x.shape
    before = (
        jnp.zeros_like(x, jnp.float32, shape=(batch, memory, channels)) if state is None else state
    ).astype(jnp.float32)
    if segments is None:
        last = x[:, max(0, time - memory) :].astype(jnp.float32)
        return jnp.concatenate([before, last], axis=1)[:, -memory:]
    tokens = segments.real.sum(1, keepdims=True, dtype=jnp.int32)
    index = tokens - memory + jnp.arange(memory, dtype=jnp.int32)[None]
    number, last = (
        jnp.take_along_axis(segments.numbers, jnp.maximum(i, 0), axis=1) for i in (index, tokens - 1)
    )
    tail = jnp.take_along_axis(x, jnp.maximum(index, 0)[..., None], axis=1).astype(jnp.float32)
    head = jnp.take_along_axis(before, jnp.minimum(index + memory, memory - 1)[..., None], axis=1)
    inside = (index >= 0) & (number == last)
    outside = (index < 0) & (last <= 1)
    return jnp.where(inside[..., None], tail, jnp.where(outside[..., None], head, 0.0))
