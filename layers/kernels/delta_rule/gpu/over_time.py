"""States over the cuts of divided time, for the Hopper kernels of `delta_rule`.

A device walks its pieces as it does on its own (`pieces`). What a scan over all of them does there is here a composition of the
pieces of a device, which `Crossing` carries over the cuts, and a product per piece with the state that came. No token is walked
once more for it. Backward, gradients of states cross the cuts the other way, by the transposed transitions.
"""

import jax

from layers.kernels.delta_rule.gpu import pieces
from layers.kernels.delta_rule.piece import Piece
from layers.kernels.sequence_parallel import Crossing, Cut


def entering(
    k: jax.Array,
    v: jax.Array,
    vectors: jax.Array,
    inverse: jax.Array,
    state: jax.Array,
    stages: int,
    cut: Cut,
    crossing: Crossing,
) -> tuple[jax.Array, jax.Array]:
    """Returns what `pieces.entering` does, where `state` is the one before the tokens of all devices."""
    passages, added = pieces.walked(k, v, vectors, inverse, state, stages)
    before, whole = pieces.composed(passages, added, state.shape[0])
    own = crossing.before(_piece(whole), cut, state.mT).mT
    return pieces.applied(before, own), passages


def leaving(
    q: jax.Array,
    k: jax.Array,
    do: jax.Array,
    vectors: jax.Array,
    made: dict[str, jax.Array],
    passages: jax.Array,
    dfinal: jax.Array,
    scale: float,
    stages: int,
    cut: Cut,
    crossing: Crossing,
) -> jax.Array:
    """Returns what `pieces.leaving` does, where `dfinal` is the gradient of the state after this device's tokens."""
    own = pieces.asked(q, k, do, vectors, made, dfinal, scale, stages)
    after, whole = pieces.composed(passages.mT, own, dfinal.shape[0], reverse=True)
    asked = pieces.applied(whole, dfinal)
    coming = crossing.before(_piece(whole._replace(added=asked)), cut.backward, None, reverse=True).mT
    return pieces.applied(after, dfinal + coming)


def _piece(whole: pieces.Composed) -> Piece:
    """The effect of all pieces on states as (k, v)."""
    return Piece(whole.through.mT, whole.added.mT)
