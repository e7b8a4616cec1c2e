"""The kernels of `tpu`: one block of time of one group of heads, chunk by chunk.

With S the state that enters a chunk, and R the gradient of the state that leaves it (see `chunked`),

    o = P v + b q S,    P_ij = scale q_i k_j d_ij,    S' = a S + k^T (w v),
    dP = do v^T,    dv = P^T do + w k R,    R of the chunk before = a R + q^T (b do),
    dq = (dP d scale) k + b do S^T,    dk = (dP d scale)^T q + w v R^T,

where d_ij, b_i, w_j and a are the decays from j to i, from the start to i (times scale), from j to the end, and in all.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from layers.kernels.tpu_chunks import decay_gradient, decay_of, dot, masks_of, steps


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
        at = steps(settings, n)
        qs, ks = q[at, :], k[at, :]
        masks, state = masks_of(settings, n, numbers), carried[part]
        decays = [_decay(settings, n, head, g, masks) for head in range(settings.heads)]
        raw, read = dot(settings, qs, ks, 1, 1), dot(settings, qs, state, 1, 0)
        outputs = [
            dot(settings, raw * decay.weights, v[at, _lanes(settings, head)], 1, 0)
            for head, decay in enumerate(decays)
        ]
        o[at, :] = (_joined(outputs) + _spread(settings, [d.read for d in decays]) * read).astype(o.dtype)
        writing = v[at, :] * _spread(settings, [d.write for d in decays])
        keep = _spread(settings, [d.keep for d in decays])
        carried[part] = keep * state + dot(settings, ks, writing, 0, 0)

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
        at, masks = steps(settings, n), masks_of(settings, n, numbers)
        decays = [_decay(settings, n, head, g, masks) for head in range(settings.heads)]
        writing = v[at, :] * _spread(settings, [d.write for d in decays])
        keep = _spread(settings, [d.keep for d in decays])
        states[n + 1] = keep * states[n] + dot(settings, k[at, :], writing, 0, 0)

    states[0] = entering[...]
    _loop(settings, settings.chunks - 1, again)

    def chunk(count, _):
        n = settings.chunks - 1 - count
        at, masks = steps(settings, n), masks_of(settings, n, numbers)
        qs, ks = q[at, :], k[at, :]
        state, leaving = states[n], carried[part]
        decays = [_decay(settings, n, head, g, masks) for head in range(settings.heads)]
        raw, read = dot(settings, qs, ks, 1, 1), dot(settings, qs, state, 1, 0)
        passed = dot(settings, ks, leaving, 1, 0)
        dscores, dvalues, reading, writing = 0, [], [], []
        for head, decay in enumerate(decays):
            mine = _lanes(settings, head)
            values, cotangent = v[at, mine], do[at, mine]
            scores = raw * decay.weights
            dweights = dot(settings, cotangent, values, 1, 1)
            dscores += dweights * decay.weights
            written = decay.write * passed[:, mine]
            dvalues.append(dot(settings, scores, cotangent, 0, 0) + written)
            reading.append(cotangent * decay.read)
            writing.append(values * decay.write)
            for ref in dg:
                row = decay_gradient(
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
        sums[0][at, :] += dot(settings, dscores, ks, 1, 0) + dot(settings, reading, state, 1, 1)
        sums[1][at, :] += dot(settings, dscores, qs, 0, 0) + dot(settings, writing, leaving, 1, 1)
        keep = _spread(settings, [d.keep for d in decays])
        carried[part] = keep * leaving + dot(settings, qs, reading, 0, 0)

    _loop(settings, settings.chunks, chunk)

    @pl.when(part == pl.num_programs(3) - 1)
    def _():
        for target, source in zip(dqk, sums, strict=True):
            target[...] = source[...].astype(target.dtype)

    @pl.when(place == pl.num_programs(2) - 1)
    def _():
        dstate[...] = carried[part]


def _loop(settings, count, step):
    """Runs over chunks; the loop over chunks of a single head is unrolled, so that their products overlap."""
    jax.lax.fori_loop(0, count, step, None, unroll=max(count, 1) if settings.heads == 1 else 1)


def _lanes(settings, head):
    """The lanes that hold the values of a head."""
    return slice(settings.width * head, settings.width * (head + 1))


def _spread(settings, columns):
    """Repeats one column per head for all values of the head."""
    return _joined([jnp.broadcast_to(x, (x.shape[0], settings.width)) for x in columns])


def _joined(heads):
    return heads[0] if len(heads) == 1 else jnp.concatenate(heads, axis=1)


def _decay(settings, n, head, g, masks):
    return decay_of(settings, g[0][n, head : head + 1, :] if g else None, masks, settings.scale)
