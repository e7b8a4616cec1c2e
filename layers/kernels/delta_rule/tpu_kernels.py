"""The kernels of `tpu`: one block of time of one head, chunk by chunk.

With S the state that enters a chunk, d_ij, r_i, w_j and a the decays from j to i, from the start to i, from j to the end and in
all, and y_i what step i writes along k_i,

    y = T beta e,   e = v - r k S,   T = (I + L)^-1,   L_ij = beta_i d_ij k_i k_j for j < i,
    o = scale r q S + P y,   P_ij = scale d_ij q_i k_j for j <= i,   S' = a S + k^T (w y).

With R the gradient of the state S' that leaves the chunk,

    dy = P^T do + w k R,   z = T^T dy,   dv = beta z,   dL = -z y^T,   dP = do y^T,
    dq = (dP scale d) k + scale r do S^T,   dk = (dP scale d)^T q + (G + G^T) k - (r dv) S^T + (w y) R^T,   G = dL beta d,
    R of the chunk before = a R + q^T (scale r do) - k^T (r dv).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from layers.kernels.mosaic_tpu import column, row
from layers.kernels.tpu_chunks import Decay, decay_gradient, decay_of, dot, masks_of, pairs, steps, sums


def forward(settings, q, k, v, vectors, numbers, state, o, final, kept, carried):
    """Computes one block forward. References come in groups, as `mosaic_tpu.call` gives them."""
    (q,), (k,), (v,), (vectors,), (state,), (o,), (final,) = q, k, v, vectors, state, o, final
    (carried,) = carried
    place = pl.program_id(2)

    @pl.when(place == 0)
    def _():
        carried[...] = state[...]

    for ref in kept[:1]:
        ref[...] = carried[...]
    for n in range(settings.chunks):
        at, now = steps(settings, n), _chunk(settings, n, vectors, numbers)
        qs, ks, decay = q[at, :], k[at, :], now.decay
        inverse = _inverse(settings, now.strict * now.beta * dot(settings, ks, ks, 1, 1))
        for ref in kept[1:]:
            ref[at, :] = inverse.astype(ref.dtype)
        entering = carried[...]
        error = v[at, :] - decay.read * dot(settings, ks, entering, 1, 0)
        y = dot(settings, inverse, now.beta * error, 1, 0)
        scores = settings.scale * decay.weights * dot(settings, qs, ks, 1, 1)
        read = settings.scale * decay.read * dot(settings, qs, entering, 1, 0)
        o[at, :] = (read + dot(settings, scores, y, 1, 0)).astype(o.dtype)
        carried[...] = decay.keep * entering + dot(settings, ks, decay.write * y, 0, 0)

    @pl.when(place == pl.num_programs(2) - 1)
    def _():
        final[...] = carried[...]


def backward(
    settings,
    q,
    k,
    v,
    vectors,
    numbers,
    entering,
    inverses,
    do,
    dfinal,
    dqk,
    dv,
    dvectors,
    dstate,
    carried,
    states,
    errors,
    ys,
):
    """Computes one block backward, blocks in descending order; `entering` is the state at its start."""
    (q,), (k,), (v,), (vectors,), (entering,), (inverses,), (do,) = q, k, v, vectors, entering, inverses, do
    (dfinal,), (dq, dk), (dv,), (dvectors,), (dstate,) = dfinal, dqk, dv, dvectors, dstate
    (carried,), (states,), (errors,), (ys,) = carried, states, errors, ys
    place = pl.program_id(2)

    @pl.when(place == 0)
    def _():
        carried[...] = dfinal[...]

    states[0] = entering[...]
    for n in range(settings.chunks):
        at, now = steps(settings, n), _chunk(settings, n, vectors, numbers)
        ks, state, decay = k[at, :], states[n], now.decay
        errors[at, :] = v[at, :] - decay.read * dot(settings, ks, state, 1, 0)
        y = dot(settings, inverses[at, :], now.beta * errors[at, :], 1, 0)
        ys[at, :] = y.astype(ys.dtype)
        if n + 1 < settings.chunks:
            states[n + 1] = decay.keep * state + dot(settings, ks, decay.write * y, 0, 0)

    for n in reversed(range(settings.chunks)):
        at, now = steps(settings, n), _chunk(settings, n, vectors, numbers)
        qs, ks, y, cotangent = q[at, :], k[at, :], ys[at, :], do[at, :]
        state, leaving, decay = states[n], carried[...], now.decay
        weights, alike = settings.scale * decay.weights, dot(settings, ks, ks, 1, 1)
        scores = weights * dot(settings, qs, ks, 1, 1)
        dscores = dot(settings, cotangent, y, 1, 1)
        passed = decay.write * dot(settings, ks, leaving, 1, 0)
        z = dot(settings, inverses[at, :], dot(settings, scores, cotangent, 0, 0) + passed, 0, 0)
        dlower = -dot(settings, z, y, 1, 1) * now.strict
        values = now.beta * z
        dv[at, :] = values.astype(dv.dtype)
        reading, erasing = settings.scale * decay.read * cotangent, -decay.read * values
        dqs, dks = dot(settings, reading, state, 1, 1), dot(settings, erasing, state, 1, 1)
        reads = (qs * dqs + ks * dks).sum(axis=1, keepdims=True)
        dweights, dalike = dscores * weights, now.beta * dlower
        dq[at, :] = (dqs + dot(settings, dweights, ks, 1, 0)).astype(dq.dtype)
        dks += dot(settings, dweights, qs, 0, 0) + dot(settings, decay.write * y, leaving, 1, 1)
        dks += dot(settings, dalike, ks, 1, 0) + dot(settings, dalike, ks, 0, 0)
        dk[at, :] = dks.astype(dk.dtype)
        dbeta = (dlower * alike).sum(axis=1, keepdims=True)
        dvectors[n, :1, :] = row(dbeta + (z * errors[at, :]).sum(axis=1, keepdims=True))
        if vectors.shape[1] > 1:
            kept = decay.keep * (state * leaving).sum(axis=1, keepdims=True).sum(axis=0, keepdims=True)
            exponents = dscores * scores + dalike * alike
            dvectors[n, 1:, :] = decay_gradient(
                settings, exponents, reads, (passed * y).sum(axis=1, keepdims=True), kept
            )
        carried[...] = (
            decay.keep * leaving + dot(settings, qs, reading, 0, 0) + dot(settings, ks, erasing, 0, 0)
        )

    @pl.when(place == pl.num_programs(2) - 1)
    def _():
        dstate[...] = carried[...]


class _Chunk(NamedTuple):
    """What the vectors of a chunk say.

    Attributes:
      beta: (c, 1).
      decay: see `Decay`, without a scale.
      strict: its weights for j < i, else 0.
    """

    beta: jax.Array
    decay: Decay
    strict: jax.Array


def _chunk(settings, n, vectors, numbers):
    rows = vectors[n]
    decay = decay_of(settings, rows[1:] if len(rows) > 1 else None, masks_of(settings, n, numbers), 1.0)
    strict = jnp.where(pairs(settings.chunk, jnp.greater), decay.weights, 0)
    return _Chunk(column(rows[:1]), decay, strict)


def _inverse(settings, lower):
    """(I + lower)^-1 for strictly lower triangular (c, c), c a power of two, by the steps of `triangular`.

    Blocks on the diagonal are inverted; T <- T - T C T joins neighbours, with C the entries between them. With bfloat16
    operands the errors of these steps add up, and a step of Newton, T + T (I - (I + L) T) with L in two parts, removes them.
    """
    size = settings.chunk
    rows, columns = (jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    differing = rows ^ columns  # its highest bit is the size of the blocks that the entry joins
    one = (differing == 0).astype(jnp.float32)
    result = one - jnp.where(differing == 1, lower, 0)
    for level in range(1, size.bit_length() - 1):
        between = jnp.where(differing >> level == 1, lower, 0)
        result -= dot(settings, dot(settings, result, between, 1, 0), result, 1, 0)
    if settings.dtype != jnp.bfloat16:
        return result
    rounded = result.astype(jnp.bfloat16).astype(jnp.float32)
    return rounded + dot(settings, rounded, one - rounded - sums(settings, lower, rounded), 1, 0)
