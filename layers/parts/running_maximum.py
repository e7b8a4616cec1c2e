"""The running maximum by which sums of exponentials stay within the range of floating numbers."""

import jax
import jax.numpy as jnp

from layers.typing import Array, Bool, Float

# Logarithm of a zero weight; sums of many of them stay finite.
EMPTY = -1e30


def running_maximum(
    values: Float[Array, "b t d"],
    steps: Float[Array, "b t d"],
    starts: Bool[Array, "b t 1"] | None,
    initial: Float[Array, "b d"],
) -> Float[Array, "b t d"]:
    """Returns m_t = max(m_{t-1} + steps_t, values_t) with m_0 = `initial`, and m_t = values_t at `starts`, if there are any."""

    def join(first, second):
        return first[0] + second[0], jnp.maximum(first[1] + second[0], second[1])

    def join_within(first, second):
        # Selects: the maximum with a NaN of an earlier segment is NaN.
        joined = join(first[1:], second[1:])
        return first[0] | second[0], *(jnp.where(second[0], b, a) for a, b in zip(joined, second[1:]))

    if starts is None:
        total, highest = jax.lax.associative_scan(join, (steps, values), axis=1)
        return jnp.maximum(highest, total + initial[:, None])
    starts = jnp.broadcast_to(starts, values.shape)
    begun, total, highest = jax.lax.associative_scan(join_within, (starts, steps, values), axis=1)
    return jnp.where(begun, highest, jnp.maximum(highest, total + initial[:, None]))
