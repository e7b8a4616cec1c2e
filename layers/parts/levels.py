"""Linear attention whose past is divided into buckets of growing size, each with a weight of its own at every token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels.gated_linear_attention import gated_linear_attention
from layers.kernels.sizes import known
from layers.segments import Segments
from layers.typing import Array, Float, Int


class LevelStates(NamedTuple):
    """What is carried: the memory of every level, float32, and the number of tokens of the segment modulo 2^L."""

    memories: Float[Array, "b l h k v"]
    position: Int[Array, "b"]


def level_attention(
    q: Float[Array, "b t g k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t h v"],
    weights: Float[Array, "b t h n"],
    *,
    log_decay: Float[Array, "b t h"],
    initial_state: LevelStates | None,
    segment_ids: Segments | None,
) -> tuple[Float[Array, "b t h v"], LevelStates | None]:
    """Returns log-linear attention with one decay per head and token, and its states (Guo et al. 2025, arXiv:2506.04761).

        o_t = sum_{s <= t} w_t^{l(t, s)} (q_t^T k_s) exp(sum_{s < r <= t} log_decay_r) v_s

    With positions from 0 in a segment, l(t, t) = 0, and l(t, s) > 0 is the number of the highest bit in which t and s differ, from 1:
    a token sees the tokens before it in buckets of 2^{l-1} tokens, of which the nearest are the smallest. Level l is
    linear attention within blocks of 2^l tokens, from the second half of each to its first half. Tokens in different blocks of 2^L do
    not see each other.

    Args:
      weights: w, those of the levels 0 to L = n - 1.
      initial_state: states of the tokens before; None for none, and then None comes back.
    """
    levels = weights.shape[-1] - 1
    batch, time = q.shape[:2]
    first = jnp.zeros((batch,), jnp.int32) if initial_state is None else initial_state.position
    if segment_ids is None:
        real = jnp.ones((batch, time), bool)
        positions = first[:, None] + jnp.arange(time, dtype=jnp.int32)[None]
    else:
        real = segment_ids.real
        positions = segment_ids.positions + jnp.where(segment_ids.numbers == 1, first[:, None], 0)
    starts = jnp.zeros_like(real) if segment_ids is None else segment_ids.starts
    ends = jnp.where(real, positions, -1)[:, ::-1]
    found = jnp.argmax(ends >= 0, axis=1)[:, None] if time else None
    last = first if found is None else jnp.take_along_axis(ends, found, axis=1)[:, 0] + 1
    last = jnp.where(real.any(1), last, first)

    def level(total, inputs):
        number, weight, memory = inputs
        first_half = (positions >> (number - 1)) & 1 == 0
        block_starts = real & (starts | (positions & ((1 << number) - 1) == 0))
        # Blocks are segments: every one has another id than the one before.
        ids = jnp.where(real, 1 + jnp.cumsum(block_starts, axis=1, dtype=jnp.int32), 0)
        read, memory = gated_linear_attention(
            q,
            jnp.where(first_half[..., None, None], k, 0),
            v,
            log_decay=log_decay,
            scale=1.0,
            initial_state=memory,
            segment_ids=Segments.of(ids),
        )
        total = total + jnp.where(
            first_half[..., None, None], 0, weight[..., None] * read.astype(jnp.float32)
        )
        # A memory is empty where a block ends, so that the next call may begin one.
        full = last & ((1 << number) - 1) == 0
        return total, jnp.where(full[:, None, None, None], 0, memory)

    heads = v.shape[2]
    own = (q.astype(jnp.float32) * k.astype(jnp.float32)).sum(-1)
    own = jnp.repeat(own, heads // own.shape[2], axis=2) * weights[..., 0]
    total = own[..., None] * v.astype(jnp.float32)
    if initial_state is None and known(time):
        # Higher bits of positions are zero.
        levels = min(levels, max(time - 1, 0).bit_length())
    shape = (levels, batch, heads, q.shape[-1], v.shape[-1])
    memories = jnp.zeros(shape, jnp.float32)
    if initial_state is not None:
        memories = jnp.moveaxis(initial_state.memories, 1, 0)
    numbers = jnp.arange(1, levels + 1, dtype=jnp.int32)
    by_level = jnp.moveaxis(weights[..., 1 : levels + 1], -1, 0)
    total, memories = jax.lax.scan(level, total, (numbers, by_level, memories))
    if initial_state is None:
        return total, None
    return total, LevelStates(jnp.moveaxis(memories, 0, 1), last & ((1 << levels) - 1))
