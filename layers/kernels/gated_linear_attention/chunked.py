"""Gated linear attention in chunks of the sequence: matrix products, and a backward pass of its own.

A chunk of c steps, entered by the state S, gives

    o = P v + (q b) S,    P_ij = scale q_i k_j decay(j -> i),    b_i = scale decay(start -> i),
    S' = a S + (k w)^T v,    a = decay(start -> end),    w_j = decay(j -> end),

where S comes from a short scan over the contributions of the chunks; everything else is a batched product over all chunks
and heads. With R the gradient of the state that leaves a chunk, the backward pass is

    dP = do v^T,    dv = P^T do + (k w) R,    d(q b) = do S^T,    d(k w) = v R^T,
    R of the chunk before = a R + (q b)^T do,

and the gradients of q, k and log-decay through P come from differentiating the scores again. The backward pass keeps the
inputs and the states S in the type of the products. With a decay per channel it also keeps P, which is then expensive to
compute and half the size of q. With one decay per head the factors b and w multiply outputs and values instead, so that
heads that share queries and keys share their products.

Byte floor at 8 x 4096 tokens and 16 heads of 128 in bfloat16: with one decay per head 0.5 GB forward and 1.5 GB with the
backward pass; with a float32 decay per channel 0.8 and 2.3 GB. XLA moves about ten times as much.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels.forward_mode import NOT_OVER_REVERSE, reverse_mode_only
from layers.kernels.gated_linear_attention import channel_decay, scalar_decay
from layers.kernels.mixed_precision import contract
from layers.kernels.promotion import promoting
from layers.kernels.sizes import in_chunks, known

# Chunks per step of the scan over chunks: a larger number gives fewer, larger kernels.
UNROLL = 8


_NOT_OVER_REVERSE = NOT_OVER_REVERSE.format(primitive="gated_linear_attention")


class Settings(NamedTuple):
    """Scale of the outputs, steps per chunk, and steps per leaf of the per-channel form (None: one decay per head)."""

    scale: float
    chunk: int
    leaf: int | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(settings, q, k, v, g, bonus, state, number):
    """Returns the outputs (b, t, h, v) and the final state, both in the type of g.

    q, k (b, t, groups, k) and v (b, t, h, v) have the type of the products. g (b or 1, t, h or 1[, k]), bonus (h, k) and
    state (b, h, k, v), None for zero, are float32 or wider. `number` (b, t) holds the numbers of the segments, 0 for
    padding, whose q, k and g are zero.
    """
    return _forward(settings, q, k, v, g, bonus, state, number)[0]


class _Chunks(NamedTuple):
    """The sequence cut into n chunks, and its heads into g groups of r that share queries and keys.

    Attributes:
      q, k: (n, b, g, c, k); v: (n, b, g, c, r, v), or (n, b, g, c, x) with x = r v in products with states.
      g: log-decay (n, b or 1, g or 1, r or 1, c), or (n, b or 1, g, c, k) per channel.
      bonus: (g, r, k), or (g, k) per channel.
      same: which pairs share a segment, (n, b, 1, 1, c, c). None, like the following, if there is one segment.
      reads, writes: which steps read the entering state and which write the leaving state, (n, b, 1, c, 1).
      keeps: whether the state passes through a chunk, (n, b, 1, 1).
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    g: jax.Array
    bonus: jax.Array | None
    same: jax.Array | None = None
    reads: jax.Array | None = None
    writes: jax.Array | None = None
    keeps: jax.Array | None = None


def _chunks(settings, q, k, v, g, bonus, number):
    groups, chunk = q.shape[2], settings.chunk
    masks = ()
    if number is not None:
        number = _cut(number[..., None], chunk, 1)
        same = number[..., None] == number[..., 0][..., None, None, :]
        leaving = jnp.maximum(jax.lax.cummax(number.max((2, 3, 4)), axis=0), 1)
        entering = jnp.concatenate([jnp.ones_like(leaving[:1]), leaving[:-1]])
        reads, writes = (number == x[..., None, None, None] for x in (entering, leaving))
        masks = same.swapaxes(-3, -2), reads, writes, (entering == leaving)[..., None, None]
    if settings.leaf is not None:
        g = _cut(g, chunk, groups)[..., 0, :]
    else:
        g = _cut(g, chunk, min(g.shape[2], groups)).swapaxes(-1, -2)
        bonus = None if bonus is None else bonus.reshape(groups, -1, bonus.shape[-1])
    q, k = (_cut(x, chunk, groups)[..., 0, :] for x in (q, k))
    return _Chunks(q, k, _cut(v, chunk, groups), g, bonus, *masks)


def _cut(x, chunk, groups):
    """(b, t, h, ...) to (n, b, groups, c, h / groups, ...), with zeros for missing steps."""
    batch, time = x.shape[:2]
    whole = in_chunks(time, chunk)
    x = jnp.pad(x, ((0, 0), (0, whole - time)) + ((0, 0),) * (x.ndim - 2))
    x = x.reshape(batch, whole // chunk, chunk, groups, x.shape[2] // groups, *x.shape[3:])
    return x.transpose(1, 0, 3, 2, *range(4, x.ndim))


def _unroll(x):
    return UNROLL if known(x.q.shape[0]) else 1


def _join(x, time):
    """Undoes `_cut`."""
    x = x.transpose(1, 0, 3, 2, *range(4, x.ndim))
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], x.shape[3] * x.shape[4], *x.shape[5:])[:, :time]


def _within_chunks(settings, x, q, k, g, bonus):
    """Weights (n, b, g, r, c, c), and log-decay from the chunk's start to each step, from each step to its end, and in all.

    The exponents are (n, b, g, c, k), twice, and (n, b, g, k); with one decay per head r takes the place of k.
    """
    n, b, groups, c, r, _ = x.v.shape
    arguments = q, k, g, bonus, x.same, settings.scale, x.q.dtype
    if settings.leaf is None:
        last = r
        weights, (before, after, total) = scalar_decay.within_chunks(*arguments)
        before, after = before.swapaxes(-1, -2), after.swapaxes(-1, -2)
    else:
        last = x.k.shape[-1]
        weights, (before, after, total) = channel_decay.within_chunks(*arguments, settings.leaf)
    exponents = (
        jnp.broadcast_to(before, (n, b, groups, c, last)),
        jnp.broadcast_to(after, (n, b, groups, c, last)),
        jnp.broadcast_to(total, (n, b, groups, last)),
    )
    return jnp.broadcast_to(weights, (n, b, groups, r, c, c)), exponents


def _only(flags, x):
    """x where the flags of a mask of `_Chunks` are set, zero elsewhere; x if there is one segment.

    A factor of zero would not do: the state of another segment may be infinite.
    """
    if flags is None:
        return x
    return jnp.where(flags.reshape(*flags.shape, *[1] * (x.ndim - flags.ndim)), x, 0)


def _kept(x, keep, state):
    """The part of the state that passes through a chunk."""
    passed = keep * state
    return passed if x.same is None else jnp.where(keep == 0, 0, passed)


class _Passing(NamedTuple):
    """How a chunk reads the entering state and writes the leaving state, with all decays applied.

    read, write and keep are the decays themselves: exponentials times scale and masks. q, k and v are what they multiply:
    q and k with a decay per channel, otherwise v (and the outputs, by `read`).
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    read: jax.Array
    write: jax.Array
    keep: jax.Array


def _passing(settings, x, exponents):
    before, after, total = (jnp.exp(e) for e in exponents)
    read = settings.scale * before
    write, keep = after, total
    if x.same is not None:
        read, write = jnp.where(x.reads, read, 0), jnp.where(x.writes, write, 0)
        keep = jnp.where(x.keeps, keep, 0)
    if settings.leaf is None:
        v = (x.v * write[..., None]).astype(x.v.dtype)
        keep = jnp.repeat(keep, v.shape[-1], axis=-1)[..., None, :]
        return _Passing(x.q, x.k, v, read, write, keep)
    q, k = ((a * decay).astype(a.dtype) for a, decay in ((x.q, read), (x.k, write)))
    return _Passing(q, k, x.v, read, write, keep[..., None])


def _forward(settings, q, k, v, g, bonus, state, number):
    # Products with rounded operands have gradients of their own.
    given = q, k, v, g, bonus, state
    q, k, v, g, bonus, state = reverse_mode_only(given, _NOT_OVER_REVERSE)
    x = _chunks(settings, q, k, v, g, bonus, number)
    wide = g.dtype
    weights, exponents = _within_chunks(settings, x, x.q.astype(wide), x.k.astype(wide), x.g, x.bonus)
    passing = _passing(settings, x, exponents)
    written = contract("nbgck,nbgcx->nbgkx", passing.k, _flat(passing.v))
    groups, r = x.v.shape[2], x.v.shape[4]

    def step(entering, inputs):
        keep, written = inputs
        return _kept(x, keep, entering) + written, entering.astype(x.q.dtype)

    # Zeros made from `written` are divided over devices as it is.
    start = jnp.where(False, written[0], 0) if state is None else _to_groups(state, groups, r)
    final, states = jax.lax.scan(step, start, (passing.keep, written), unroll=_unroll(x))
    o = contract("nbgck,nbgkx->nbgcx", passing.q, states).reshape(x.v.shape)
    o = o * passing.read[..., None] if settings.leaf is None else o
    o = _only(x.reads, o)
    o = o + contract("nbgrij,nbgjrv->nbgirv", weights, x.v)
    kept = None if settings.leaf is None else weights
    has_state = None if state is None else ()
    residuals = q, k, v, g, bonus, has_state, number, states, kept
    return (_join(o, q.shape[1]), _from_groups(final, r)), residuals


def _backward(settings, residuals, cotangents):
    q, k, v, g, bonus, has_state, number, states, weights = residuals
    do, dfinal = cotangents
    x = _chunks(settings, q, k, v, g, bonus, number)
    wide, dtype = dfinal.dtype, q.dtype
    groups, r = x.v.shape[2], x.v.shape[4]
    do = _cut(do.astype(dtype), settings.chunk, groups)
    (recomputed, exponents), within_vjp = jax.vjp(
        functools.partial(_within_chunks, settings, x), x.q.astype(wide), x.k.astype(wide), x.g, x.bonus
    )
    passing = _passing(settings, x, exponents)
    do_read = do if settings.leaf is not None else (do * passing.read[..., None]).astype(dtype)

    def step(leaving, inputs):
        keep, read = inputs
        return _kept(x, keep, leaving) + read, leaving.astype(dtype)

    read = contract("nbgck,nbgcx->nbgkx", passing.q, _flat(do_read))
    dstate, dstates = jax.lax.scan(
        step, _to_groups(dfinal, groups, r), (passing.keep, read), reverse=True, unroll=_unroll(x)
    )
    dq_read = _only(x.reads, contract("nbgcx,nbgkx->nbgck", _flat(do_read), states))
    dk_write = _only(x.writes, contract("nbgcx,nbgkx->nbgck", _flat(passing.v), dstates))
    dv_write = contract("nbgck,nbgkx->nbgcx", passing.k, dstates).reshape(x.v.shape)
    dv_write = _only(x.writes, dv_write)
    kept = _only(x.keeps, passing.keep * states.astype(wide) * dstates.astype(wide))
    if settings.leaf is not None:
        dexponents = passing.q * dq_read, passing.k * dk_write, kept.sum(-1)
        dq_read, dk_write = dq_read * passing.read, dk_write * passing.write
    else:
        if r == 1:
            dbefore = (passing.q * dq_read).sum(-1, keepdims=True)
        else:
            read_states = contract("nbgck,nbgkx->nbgcx", passing.q, states).reshape(x.v.shape)
            dbefore = (do_read * _only(x.reads, read_states)).sum(-1)
        dexponents = (
            dbefore,
            (passing.v * dv_write).sum(-1),
            kept.sum(-2).reshape(*kept.shape[:3], r, -1).sum(-1),
        )
        dv_write = dv_write * passing.write[..., None]

    dv = contract("nbgrij,nbgirv->nbgjrv", recomputed if weights is None else weights, do) + dv_write
    dweights = contract("nbgirv,nbgjrv->nbgrij", do, x.v, dtype)
    dq, dk, dg, dbonus = within_vjp((dweights, dexponents))
    time = q.shape[1]
    dg = _join(dg[..., None, :] if settings.leaf is not None else dg.swapaxes(-1, -2), time)
    dq, dk = (_join(a[..., None, :], time).astype(dtype) for a in (dq + dq_read, dk + dk_write))
    return (
        dq,
        dk,
        _join(dv, time).astype(v.dtype),
        dg,
        None if bonus is None else dbonus.reshape(bonus.shape),
        None if has_state is None else _from_groups(dstate, r),
        None,
    )


attend.defvjp(promoting(_forward), promoting(_backward))


def _to_groups(state, groups, r):
    """(b, h, k, v) to (b, g, k, r v)."""
    b, _, k, v = state.shape
    return state.reshape(b, groups, r, k, v).swapaxes(2, 3).reshape(b, groups, k, r * v)


def _from_groups(state, r):
    """Undoes `_to_groups`."""
    b, groups, k, x = state.shape
    return state.reshape(b, groups, k, r, x // r).swapaxes(2, 3).reshape(b, groups * r, k, x // r)


def _flat(v):
    """(..., r, v) to (..., r v)."""
    return v.reshape(*v.shape[:-2], -1)
