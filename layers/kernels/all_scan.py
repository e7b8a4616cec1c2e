"""States that flow from device to device in blocks: the All-Scan of ZeCO (Chou et al. 2025, arXiv:2507.01004).

Device p receives the state before its tokens, S, and sends T S + U to the next, where (T, U) is the piece of its tokens. The
state is cut into K blocks that flow as a pipeline: in round r device p handles block r - p. A device sends K + P - 2 blocks,
(K + P - 2) / K states in all whatever the number of devices, where gathering takes P - 1 states and transitions and
composing them on every device P steps. The backward pass is the same pipeline the other way.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from layers.kernels import kept
from layers.kernels.partition import SEQUENCE_AXIS

# More rounds run as a loop, so that compiling does not take longer with more devices.
MOST_UNROLLED = 16


def all_scan(
    piece: Any,
    compose: Callable[[Any, Any], Any],
    state: jax.Array,
    forgets: jax.Array | None,
    *,
    elementwise: bool,
    reverse: bool = False,
) -> jax.Array:
    """Returns the state before this device's tokens.

    Args:
      piece: the effect of this device's tokens, (transition, state).
      compose: the composition of two pieces.
      state: the state before all tokens, of the shape of the piece's.
      forgets: (b,), whether this device's tokens forget what was before them; None if never.
      elementwise: whether the transition multiplies the state number by number, so that both are cut. Otherwise the last
        axis of the state is one that no transition mixes.
      reverse: whether the last device's tokens are run first.
    """
    index, count = jax.lax.axis_index(SEQUENCE_AXIS), jax.lax.axis_size(SEQUENCE_AXIS)
    place = count - 1 - index if reverse else index
    to = [(i, i - 1) if reverse else (i, i + 1) for i in range(count)]
    to = [(i, j) for i, j in to if 0 <= j < count]
    size = state.shape[-1]
    blocks = max(n for n in range(1, min(count, size) + 1) if size % n == 0)

    def cut(x):
        return jnp.moveaxis(x.reshape(*x.shape[:-1], blocks, -1), -2, 0)

    states, initial = cut(piece.state), cut(state)
    transitions = cut(piece[0]) if elementwise and piece[0].shape[-1] == size else None

    def arrive(number, incoming, before):
        """The block of a round, and the states before this device with what has arrived; other rounds change nothing."""
        block = number - place
        at = jnp.clip(block, 0, blocks - 1)
        incoming = jnp.where(place == 0, initial[at], incoming)
        now = (block >= 0) & (block < blocks)
        return at, incoming, before.at[at].set(jnp.where(now, incoming, before[at]))

    def run(carry, number):
        at, incoming, before = arrive(number, *carry)
        if forgets is not None:
            incoming = jnp.where(forgets.reshape(-1, *[1] * (incoming.ndim - 1)), 0, incoming)
        one = type(piece)(piece[0] if transitions is None else transitions[at], states[at])
        after = compose(one._replace(state=incoming), one).state
        return (kept.named(jax.lax.ppermute(after, SEQUENCE_AXIS, to)), before), None

    rounds = blocks + count - 2
    carry = jnp.zeros_like(states[0]), jnp.zeros_like(states)
    carry, _ = jax.lax.scan(run, carry, jnp.arange(rounds), unroll=rounds <= MOST_UNROLLED)
    _, _, before = arrive(rounds, *carry)
    return jnp.moveaxis(before, 0, -2).reshape(state.shape)
