"""The effect of consecutive tokens on the state of a delta rule, and how two of them follow each other."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Piece(NamedTuple):
    """The effect of consecutive tokens on the state: S -> transition S + state."""

    transition: jax.Array
    state: jax.Array


def compose(first: Piece, second: Piece) -> Piece:
    """Returns the effect of `first` followed by `second`. Associative; the identity is Piece(I, 0)."""

    def product(a, b):
        return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)

    state = product(second.transition, first.state) + second.state
    return Piece(product(second.transition, first.transition), state)
