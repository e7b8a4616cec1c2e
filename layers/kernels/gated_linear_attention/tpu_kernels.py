"""The kernels of `tpu`: one block of time of one group of heads, chunk by chunk.

For a chunk with the state S that enters it, and R, the gradient of the one that leaves (see `chunked`),

    o = P v + b q S,    P_ij = scale q_i k_j d_ij,    S' = a S + k^T (w v),
    dP = do v^T,    dv = P^T do + w k R,    R of the chunk before = a R + q^T (b do),
    dq = (dP d scale) k + b do S^T,    dk = (dP d scale)^T q + w v R^T,

where d_ij, b_i, w_j and a are the decays from j to i, from the start to i (times scale), from j to the end and over all.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from layers.kernels.mosaic_tpu import column


def forward(settings, q, k, v, g, numbers, state, o, final, entering, carried):
    """One block forward. References in groups, as `mosaic_tpu.call` gives them."""
    (q,), (k,), (v,), (state,), (o,), (final,), (carried,) = q, k, v, state, o, final, carried
    place, part = pl.program_id(2), pl.program_id(3)

    @pl.when(place == 0)
    def _():
        carried[part] = state[...]

    for ref in entering:
        ref[...] = carried[part]

    def chunk(n, _):
        at = pl.ds(pl.multiple_of(n * settings.chunk, settings.chunk), settings.chunk)
        qs, ks, vs = q[at, :], k[at, :], v[at, :]
        decay = _decays(settings, n, g, numbers)
        raw = _dot(settings, qs, ks, 1, 1)
        outputs = [
            _dot(settings, raw * weight, value, 1, 0)
            for weight, value in zip(decay.weights, _heads(settings, vs), strict=True)
        ]
        state = carried[part]
        read = _dot(settings, qs, state, 1, 0)
        o[at, :] = (jnp.concatenate(outputs, axis=1) + decay.read * read).astype(o.dtype)
        carried[part] = _next(settings, decay, state, ks, vs)

    jax.lax.fori_loop(0, settings.chunks, chunk, None)

    @pl.when(place == pl.num_programs(2) - 1)
    def _():
        final[...] = carried[part]


def backward(settings, q, k, v, g, numbers, entering, do, dfinal, dqk, dv, dg, dstate, carried, states, sums):
    """One block backward, blocks in descending order; `entering` is the state at its start."""
    (q,), (k,), (v,), (entering,), (do,), (dfinal,) = q, k, v, entering, do, dfinal
    (dv,), (dstate,), (carried,), (states,) = dv, dstate, carried, states
    place, part = pl.program_id(2), pl.program_id(3)
    chunks = settings.chunks

    @pl.when(place == 0)
    def _():
        carried[part] = dfinal[...]

    @pl.when(part == 0)
    def _():
        for ref in sums:
            ref[...] = jnp.zeros_like(ref)

    def steps(n):
        return pl.ds(pl.multiple_of(n * settings.chunk, settings.chunk), settings.chunk)

    def again(n, _):
        decay = _decays(settings, n, g, numbers)
        states[n + 1] = _next(settings, decay, states[n], k[steps(n), :], v[steps(n), :])

    states[0] = entering[...]
    jax.lax.fori_loop(0, chunks - 1, again, None)

    def chunk(count, _):
        n = chunks - 1 - count
        at = steps(n)
        qs, ks, vs, dos = q[at, :], k[at, :], v[at, :], do[at, :]
        decay = _decays(settings, n, g, numbers)
        state, leaving = states[n], carried[part]
        raw = _dot(settings, qs, ks, 1, 1)
        dscores, dvs, dexponents = 0, [], []
        for weight, value, cotangent in zip(
            decay.weights, _heads(settings, vs), _heads(settings, dos), strict=True
        ):
            scores = raw * weight
            dweights = _dot(settings, cotangent, value, 1, 1)
            dscores += dweights * weight
            dvs.append(_dot(settings, scores, cotangent, 0, 0))
            dexponents.append(dweights * scores)
        reading = dos * decay.read
        writing = vs * decay.write
        written = decay.write * _dot(settings, ks, leaving, 1, 0)
        dv[at, :] = (jnp.concatenate(dvs, axis=1) + written).astype(dv.dtype)
        for target, own, other in (
            (sums[0], _dot(settings, dscores, ks, 1, 0), _dot(settings, reading, state, 1, 1)),
            (sums[1], _dot(settings, dscores, qs, 0, 0), _dot(settings, writing, leaving, 1, 1)),
        ):
            target[at, :] += own + other
        carried[part] = decay.keep * leaving + _dot(settings, qs, reading, 0, 0)
        if dg:
            dread = reading * _dot(settings, qs, state, 1, 0)
            rows = _decay_gradients(settings, dexponents, dread, vs * written, decay.keep * (state * leaving))
            for ref in numbers:
                rows = jnp.where(ref[n][:1] == 0, 0, rows)
            dg[0][n] = rows

    jax.lax.fori_loop(0, chunks, chunk, None)

    @pl.when(part == pl.num_programs(3) - 1)
    def _():
        for target, source in zip(dqk, sums, strict=True):
            target[...] = source[...].astype(target.dtype)

    @pl.when(place == pl.num_programs(2) - 1)
    def _():
        dstate[...] = carried[part]


class _Decays(NamedTuple):
    """The decays of a chunk.

    Attributes:
      weights: scale times the decay from j to i, 0 for pairs that do not see each other; (c, c), one a head.
      read: scale times that from the start to each step, (c, heads v), or (c, 1) for all; 0 where the state is not seen.
      write: that from each step to the end, likewise.
      keep: that over all steps, (1, heads v), or a number.
    """

    weights: list[jax.Array]
    read: jax.Array
    write: jax.Array
    keep: jax.Array


def _decays(settings, n, g, numbers):
    size = settings.chunk
    seen = _pairs(size, jnp.greater_equal)
    reads = writes = jnp.ones((size, 1), bool)
    keeps = jnp.ones((1, 1), bool)
    row = None
    for ref in numbers:
        row, entering = ref[n][:1], ref[n][1:, :1]
        own = column(row)
        leaving = jnp.maximum(entering, row.max(axis=1, keepdims=True))
        seen &= (own == row) & (row != 0)
        reads, writes, keeps = own == entering, own == leaving, entering == leaving
    if not g:
        weights = [jnp.where(seen, settings.scale, 0.0)] * settings.heads
        read = jnp.where(reads, settings.scale, 0.0)
        return _Decays(weights, read, writes.astype(jnp.float32), keeps.astype(jnp.float32))
    past = _pairs(size, jnp.greater_equal)
    weights, read, write, keep = [], [], [], []
    for head in range(settings.heads):
        log_decay = g[0][n, head : head + 1, :]
        if row is not None:
            log_decay = jnp.where(row == 0, 0, log_decay)
        upto, after = jnp.where(past, log_decay, 0), jnp.where(past, 0, log_decay)
        between = _sums(settings, upto, _pairs(size, jnp.greater))
        weights.append(jnp.where(seen, settings.scale * jnp.exp(between), 0))
        read.append(jnp.where(reads, settings.scale * jnp.exp(upto.sum(axis=1, keepdims=True)), 0))
        write.append(jnp.where(writes, jnp.exp(after.sum(axis=1, keepdims=True)), 0))
        keep.append(jnp.where(keeps, jnp.exp(log_decay.sum(axis=1, keepdims=True)), 0))
    return _Decays(weights, *(_spread(settings, x) for x in (read, write, keep)))


def _decay_gradients(settings, dexponents, dread, dwrite, dkeep):
    """Gradients of log-decay, (heads, c), from those of exponents: of scores, reads, writes and the whole chunk.

    Step t collects the scores of all pairs j < t <= i, the reads of all i >= t and the writes of all j < t.
    """
    size = settings.chunk
    past, before = _pairs(size, jnp.greater_equal), _pairs(size, jnp.less)
    rows = []
    for dexponent, read, write, keep in zip(
        dexponents, *(_heads(settings, x) for x in (dread, dwrite, dkeep)), strict=True
    ):
        earlier = _dot(settings, dexponent, before, 1, 0)
        row = jnp.where(
            past, earlier + read.sum(axis=1, keepdims=True), write.sum(axis=1, keepdims=True)
        ).sum(axis=0, keepdims=True)
        rows.append(row + keep.sum(axis=1, keepdims=True).sum(axis=0, keepdims=True))
    return jnp.concatenate(rows, axis=0)


def _next(settings, decay, state, k, v):
    return decay.keep * state + _dot(settings, k, v * decay.write, 0, 0)


def _pairs(size, relation):
    """`relation(i, j)` for all pairs of steps of a chunk."""
    return relation(*(jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1)))


def _heads(settings, x):
    """The values of each head."""
    return [x[:, settings.width * n : settings.width * (n + 1)] for n in range(settings.heads)]


def _spread(settings, columns):
    """Repeats one column a head for all its values."""
    return jnp.concatenate([jnp.broadcast_to(x, (x.shape[0], settings.width)) for x in columns], axis=1)


def _dot(settings, a, b, a_axis, b_axis):
    """Product over an axis of each, with operands of the type of the settings and float32 sums."""
    return jax.lax.dot_general(
        a.astype(settings.dtype),
        b.astype(settings.dtype),
        (((a_axis,), (b_axis,)), ((), ())),
        precision=jax.lax.Precision.DEFAULT if settings.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _sums(settings, terms, chosen):
    """Sums of float32 terms over what is chosen: one product, or for bfloat16 operands those of two parts of the terms."""
    if settings.dtype != jnp.bfloat16:
        return _dot(settings, terms, chosen, 1, 0)
    coarse = terms.astype(jnp.bfloat16).astype(jnp.float32)
    return _dot(settings, coarse, chosen, 1, 0) + _dot(settings, terms - coarse, chosen, 1, 0)
