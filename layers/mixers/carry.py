"""Carrying states from call to call when rows hold several segments.

A mixer's state remembers the id of the last real token of every row, 0 while there was none. The next call continues
that segment if its first real token has the same id, or if it brings no ids; otherwise its state starts from zero.
"""

from typing import Any

import jax
import jax.numpy as jnp

from layers.kernels.segments import last_real_id
from layers.typing import Array, Bool, Int, Num


def refuse_state(mixer: str, state: Any) -> None:
    """Raises ValueError if a non-causal mixer is given a state."""
    if state is not None:
        raise ValueError(
            f"{mixer} is not causal here and has no state; call it with state=None on the whole sequence"
        )


def check_inputs(mixer: str, x: jax.Array, width: int, segment_ids: jax.Array | None) -> None:
    """Raises ValueError or TypeError unless x is (b, t, width) and the ids are integers (b, t)."""
    if x.ndim != 3 or x.shape[-1] != width:
        raise ValueError(f"x of {mixer} has shape {x.shape}; expected (b, t, {width})")
    if segment_ids is not None:
        if segment_ids.shape != x.shape[:2]:
            raise ValueError(f"segment_ids of {mixer} has shape {segment_ids.shape}; expected {x.shape[:2]}")
        if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise TypeError(f"segment_ids of {mixer} has dtype {segment_ids.dtype}; expected an integer type")


def mask_padding(x: Num[Array, "b t *f"], segment_ids: Int[Array, "b t"] | None) -> Num[Array, "b t *f"]:
    """Zeroes the features of padding tokens."""
    if segment_ids is None:
        return x
    return jnp.where(jnp.expand_dims(segment_ids != 0, tuple(range(2, x.ndim))), x, 0)


def continues(segment: Int[Array, "b"], segment_ids: Int[Array, "b t"] | None) -> Bool[Array, "b"]:
    """Whether the state of each row belongs to the first real token of this call."""
    if segment_ids is None or segment_ids.shape[1] == 0:
        return jnp.ones(segment.shape, bool)
    index = jnp.argmax(segment_ids != 0, axis=1)
    first = jnp.take_along_axis(segment_ids, index[:, None], axis=1)[:, 0]
    return (segment == 0) | (first == 0) | (first == segment)


def next_segment(
    segment: Int[Array, "b"], segment_ids: Int[Array, "b t"] | None, time: int
) -> Int[Array, "b"]:
    """The id to remember after a call of `time` tokens. Without ids, rows that had none yet count as segment 1."""
    if time == 0:
        return segment
    if segment_ids is None:
        return jnp.where(segment == 0, 1, segment)
    return last_real_id(segment_ids, segment)[:, -1].astype(segment.dtype)


def enter(state: Num[Array, "b *s"], keep: Bool[Array, "b"]) -> Num[Array, "b *s"]:
    """The carried state where it is kept, zero elsewhere."""
    return jnp.where(jnp.expand_dims(keep, tuple(range(1, state.ndim))), state, 0)
