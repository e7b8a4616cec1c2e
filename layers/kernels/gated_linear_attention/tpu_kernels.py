"""The kernels of `tpu`: one block of time of one group of heads, chunk by chunk.

With S the state that enters a chunk, and R the gradient of the state that leaves it (see `chunked`),

    o = P v + b q S,    P_ij = scale q_i k_j d_ij,    S' = a S + k^T (w v),
    dP = do v^T,    dv = P^T do + w k R,    R of the chunk before = a R + q^T (b do),
    dq = (dP d scale) k + b do S^T,    dk = (dP d scale)^T q + w v R^T,

where d_ij, b_i, w_j and a are the decays from j to i, from the start to i (times scale), from j to the end, and in all.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from layers.kernels.mosaic_tpu import column


def forward(settings, q, k, v, g, numbers, state, o, final, entering, carried):
    """Computes one block forward. References come in groups, as `mosaic_tpu.call` gives them."""
    (q,), (k,), (v,), (state,), (o,), (final,), (carried,) = q, k, v, state, o, final, carried
    place, part = pl.program_id(2), pl.program_id(3)

    @pl.when(place == 0)
    def _():
        carried[part] = state[...]

    for ref in entering:
        ref[...] = carried[part]

    def chunk(n, _):
        at = _steps(settings, n)
        qs, ks = q[at, :], k[at, :]
        masks, state = _masks(settings, n, numbers), carried[part]
        decays = [_decay(settings, n, head, g, masks) for head in range(settings.heads)]
        raw, read = _dot(settings, qs, ks, 1, 1), _dot(settings, qs, state, 1, 0)
        outputs = [
            _dot(settings, raw * decay.weights, v[at, _lanes(settings, head)], 1, 0)
            for head, decay in enumerate(decays)
        ]
        o[at, :] = (_joined(outputs) + _spread(settings, [d.read for d in decays]) * read).astype(o.dtype)
        writing = v[at, :] * _spread(settings, [d.write for d in decays])
        keep = _spread(settings, [d.keep for d in decays])
        carried[part] = keep * state + _dot(settings, ks, writing, 0, 0)

    _loop(settings, settings.chunks, chunk)

    @pl.when(place == pl.num_programs(2) - 1)
    def _():
        final[...] = carried[part]


def backward(settings, q, k, v, g, numbers, entering, do, dfinal, dqk, dv, dg, dstate, carried, states, sums):
    """Computes one block backward, blocks in descending order; `entering` is the state at its start."""
    (q,), (k,), (v,), (entering,), (do,), (dfinal,) = q, k, v, entering, do, dfinal
    (dv,), (dstate,), (carried,), (states,) = dv, dstate, carried, states
    place, part = pl.program_id(2), pl.program_id(3)

    @pl.when(place == 0)
    def _():
        carried[part] = dfinal[...]

    @pl.when(part == 0)
    def _():
        for ref in sums:
            ref[...] = jnp.zeros_like(ref)

    def again(n, _):
        at, masks = _steps(settings, n), _masks(settings, n, numbers)
        decays = [_decay(settings, n, head, g, masks) for head in range(settings.heads)]
        writing = v[at, :] * _spread(settings, [d.write for d in decays])
        keep = _spread(settings, [d.keep for d in decays])
        states[n + 1] = keep * states[n] + _dot(settings, k[at, :], writing, 0, 0)

    states[0] = entering[...]
    _loop(settings, settings.chunks - 1, again)

    def chunk(count, _):
        n = settings.chunks - 1 - count
        at, masks = _steps(settings, n), _masks(settings, n, numbers)
        qs, ks = q[at, :], k[at, :]
        state, leaving = states[n], carried[part]
        decays = [_decay(settings, n, head, g, masks) for head in range(settings.heads)]
        raw, read = _dot(settings, qs, ks, 1, 1), _dot(settings, qs, state, 1, 0)
        passed = _dot(settings, ks, leaving, 1, 0)
        dscores, dvalues, reading, writing = 0, [], [], []
        for head, decay in enumerate(decays):
            mine = _lanes(settings, head)
            values, cotangent = v[at, mine], do[at, mine]
            scores = raw * decay.weights
            dweights = _dot(settings, cotangent, values, 1, 1)
            dscores += dweights * decay.weights
            written = decay.write * passed[:, mine]
            dvalues.append(_dot(settings, scores, cotangent, 0, 0) + written)
            reading.append(cotangent * decay.read)
            writing.append(values * decay.write)
            for ref in dg:
                row = _decay_gradient(
                    settings,
                    dweights * scores,
                    (reading[-1] * read[:, mine]).sum(axis=1, keepdims=True),
                    (values * written).sum(axis=1, keepdims=True),
                    decay.keep
                    * (state[:, mine] * leaving[:, mine]).sum(axis=1, keepdims=True).sum(0, keepdims=True),
                )
                ref[n, head : head + 1, :] = row if masks.row is None else jnp.where(masks.row == 0, 0, row)
        dv[at, :] = _joined(dvalues).astype(dv.dtype)
        reading, writing = _joined(reading), _joined(writing)
        sums[0][at, :] += _dot(settings, dscores, ks, 1, 0) + _dot(settings, reading, state, 1, 1)
        sums[1][at, :] += _dot(settings, dscores, qs, 0, 0) + _dot(settings, writing, leaving, 1, 1)
        keep = _spread(settings, [d.keep for d in decays])
        carried[part] = keep * leaving + _dot(settings, qs, reading, 0, 0)

    _loop(settings, settings.chunks, chunk)

    @pl.when(part == pl.num_programs(3) - 1)
    def _():
        for target, source in zip(dqk, sums, strict=True):
            target[...] = source[...].astype(target.dtype)

    @pl.when(place == pl.num_programs(2) - 1)
    def _():
        dstate[...] = carried[part]


class _Masks(NamedTuple):
    """Which steps of a chunk see which.

    Attributes:
      seen: which j each i sees, (c, c).
      reads, writes: which steps read the entering state and write the leaving state, (c, 1).
      keeps: whether the state passes through the chunk, (1, 1).
      row: segment numbers, 0 for padding, (1, c), or None.
    """

    seen: jax.Array
    reads: jax.Array
    writes: jax.Array
    keeps: jax.Array
    row: jax.Array | None


def _masks(settings, n, numbers):
    seen = _pairs(settings.chunk, jnp.greater_equal)
    if not numbers:
        every = jnp.ones((settings.chunk, 1), bool)
        return _Masks(seen, every, every, jnp.ones((1, 1), bool), None)
    row, entering = numbers[0][n][:1], numbers[0][n][1:, :1]
    own, leaving = column(row), jnp.maximum(entering, row.max(axis=1, keepdims=True))
    seen &= (own == row) & (row != 0)
    return _Masks(seen, own == entering, own == leaving, entering == leaving, row)


class _Decay(NamedTuple):
    """The decays of one head in a chunk.

    Attributes:
      weights: scale times the decay from j to i, 0 for pairs that do not see each other, (c, c).
      read: scale times the decay from the start to each step, 0 where the state is not seen, (c, 1).
      write: the decay from each step to the end, 0 where it does not reach the end, (c, 1).
      keep: the decay over all steps, (1, 1).
    """

    weights: jax.Array
    read: jax.Array
    write: jax.Array
    keep: jax.Array


def _decay(settings, n, head, g, masks):
    if not g:
        return _Decay(
            jnp.where(masks.seen, settings.scale, 0.0),
            jnp.where(masks.reads, settings.scale, 0.0),
            masks.writes.astype(jnp.float32),
            masks.keeps.astype(jnp.float32),
        )
    row = g[0][n, head : head + 1, :]
    if masks.row is not None:
        row = jnp.where(masks.row == 0, 0, row)
    past = _pairs(settings.chunk, jnp.greater_equal)
    upto, after = jnp.where(past, row, 0), jnp.where(past, 0, row)
    between = _sums(settings, upto, _pairs(settings.chunk, jnp.greater))
    return _Decay(
        jnp.where(masks.seen, settings.scale * jnp.exp(between), 0),
        jnp.where(masks.reads, settings.scale * jnp.exp(upto.sum(axis=1, keepdims=True)), 0),
        jnp.where(masks.writes, jnp.exp(after.sum(axis=1, keepdims=True)), 0),
        jnp.where(masks.keeps, jnp.exp(row.sum(axis=1, keepdims=True)), 0),
    )


def _decay_gradient(settings, dscores, dreads, dwrites, dkeep):
    """The gradient of log-decay, (1, c), from those of the exponents: of scores, reads, writes and the whole chunk.

    Step t collects the scores of all pairs j < t <= i, the reads of all i >= t and the writes of all j < t.
    """
    past, before = (_pairs(settings.chunk, relation) for relation in (jnp.greater_equal, jnp.less))
    earlier = _dot(settings, dscores, before, 1, 0)
    return jnp.where(past, earlier + dreads, dwrites).sum(axis=0, keepdims=True) + dkeep


def _loop(settings, count, step):
    """Runs over chunks; the loop over chunks of a single head is unrolled, so that their products overlap."""
    jax.lax.fori_loop(0, count, step, None, unroll=max(count, 1) if settings.heads == 1 else 1)


def _steps(settings, n):
    start = n * settings.chunk
    return pl.ds(start if isinstance(n, int) else pl.multiple_of(start, settings.chunk), settings.chunk)


def _lanes(settings, head):
    """The lanes that hold the values of a head."""
    return slice(settings.width * head, settings.width * (head + 1))


def _spread(settings, columns):
    """Repeats one column per head for all values of the head."""
    return _joined([jnp.broadcast_to(x, (x.shape[0], settings.width)) for x in columns])


def _joined(heads):
    return heads[0] if len(heads) == 1 else jnp.concatenate(heads, axis=1)


def _pairs(size, relation):
    """`relation(i, j)` for all pairs of steps of a chunk."""
    return relation(*(jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1)))


def _dot(settings, a, b, a_axis, b_axis):
    """The product over an axis of each, with operands in the type of the settings and float32 sums."""
    return jax.lax.dot_general(
        a.astype(settings.dtype),
        b.astype(settings.dtype),
        (((a_axis,), (b_axis,)), ((), ())),
        precision=jax.lax.Precision.DEFAULT if settings.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _sums(settings, terms, chosen):
    """Sums of float32 terms over what is chosen: one product; for bfloat16 operands, one per part of the split terms."""
    if settings.dtype != jnp.bfloat16:
        return _dot(settings, terms, chosen, 1, 0)
    coarse = terms.astype(jnp.bfloat16).astype(jnp.float32)
    return _dot(settings, coarse, chosen, 1, 0) + _dot(settings, terms - coarse, chosen, 1, 0)
