"""`delta_rule` and `dplr_delta_rule` in plain JAX: matrix products per chunk, with a backward pass of their own.

Inside a chunk of c steps entered by the state S, both rules are

    (I + L) y = values + erase S,   o = query S + scores y + output,   S <- total S + write^T y + state,

with L strictly lower triangular. The chunk acts on the state as S <- total S + M S + N, with M = write^T W and
W = (I + L)^-1 erase. A first part computes these for all chunks at once by batched products. A scan over the chunks
carries the state (one product of k x k by k x v each). A last part computes all outputs at once from the states.

The backward pass keeps the inputs, the states at the starts of chunks and (I + L)^-1. With dS' the gradient of the state
that leaves a chunk, that of the state that enters it is

    dS = total dS' + M^T dS' + query^T do + W^T scores^T do,

a scan over the chunks in reverse. Given dS and S, the rest is local to the chunks and is computed for all of them at once.

Byte floor at 8 x 4096 tokens, 16 heads of 128, bfloat16, where an array of the size of q is 0.13 GB: inputs, outputs and
their gradients are 0.54 GB forward and 1.5 GB in all. With one decay per head XLA moves about 15 times as much.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels.checks import accumulation_dtype
from layers.kernels.delta_rule.decay import RESET, scores
from layers.kernels.delta_rule.triangular import inverse
from layers.kernels.forward_mode import NOT_OVER_REVERSE, reverse_mode_only
from layers.kernels.mixed_precision import product, solve
from layers.kernels.promotion import promoting
from layers.kernels.segments import reset_mask
from layers.kernels.sizes import in_chunks, known, power_of_two

# Steps per chunk; a power of two. Longer chunks mean more arithmetic and fewer steps of the scan. With a decay per channel
# they also mean larger intermediate results.
CHUNK = 64
GPU_SCALAR_CHUNK = 128


class Rule(NamedTuple):
    """The static part of a call."""

    general: bool
    scale: float
    normalize_qk: bool
    chunk: int
    dtype: jnp.dtype  # of the operands of matrix products


class Chunks(NamedTuple):
    """The equations of a chunk, see the top of the file, as arrays (n, b, h, ...), chunks first."""

    lower: jax.Array  # (c, c)
    values: jax.Array  # (c, v)
    erase: jax.Array  # (c, k)
    query: jax.Array  # (c, k)
    scores: jax.Array  # (c, c)
    output: jax.Array | None  # (c, v)
    total: jax.Array  # (k or 1, 1)
    write: jax.Array  # (c, k)
    state: jax.Array | None  # (k, v)


def delta_rule(q, k, v, beta, log_decay, scale, normalize_qk, initial_state, segments, chunk=None):
    """Returns outputs and the final state; the public function has checked the arguments."""
    inputs = {"q": q, "k": k, "v": v, "beta": beta, "log_decay": log_decay}
    if chunk is None:
        per_channel = log_decay is not None and log_decay.ndim == 4
        chunk = CHUNK if per_channel or jax.default_backend() == "cpu" else GPU_SCALAR_CHUNK
    return _run(inputs, initial_state, segments, False, scale, normalize_qk, chunk)


def dplr_delta_rule(q, k, v, a, b, log_decay, scale, initial_state, segments, chunk=CHUNK):
    """Returns outputs and the final state of the general rule; the public function has checked the arguments."""
    inputs = {"q": q, "k": k, "v": v, "a": a, "b": b, "log_decay": log_decay}
    return _run(inputs, initial_state, segments, True, scale, False, chunk)


def _run(inputs, initial_state, segments, general, scale, normalize_qk, chunk):
    """Runs the arguments with time padded to whole chunks, so that few shapes are compiled."""
    v, k = inputs["v"], inputs["k"]
    batch, time, heads, value_dim = v.shape
    accumulate = accumulation_dtype(*inputs.values(), initial_state)
    low = all(inputs[name].dtype == jnp.bfloat16 for name in inputs if name not in ("beta", "log_decay"))
    chunk = power_of_two(time, chunk)
    rule = Rule(general, scale, normalize_qk, chunk, jnp.dtype(jnp.bfloat16) if low else accumulate)
    if initial_state is None:  # made from v, to be divided over devices as v is
        zeros = jnp.zeros_like(v[:, 0, :, None], accumulate)
        initial_state = jnp.broadcast_to(zeros, (batch, heads, k.shape[-1], value_dim))
    padding = in_chunks(time, chunk) - time
    if not known(padding) or padding:  # zeros are no-ops for both rules
        inputs, segments = jax.tree.map(
            lambda x: jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)), (inputs, segments)
        )
    o, final = _compiled(rule, inputs, segments, initial_state.astype(accumulate))
    return o[:, :time], final


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(rule, inputs, segments, state):
    return _forward(rule, inputs, segments, state)[0]


def _forward(rule, inputs, segments, state):
    # Products with rounded operands have gradients of their own.
    name = "dplr_delta_rule" if rule.general else "delta_rule"
    inputs, state = reverse_mode_only((inputs, state), NOT_OVER_REVERSE.format(primitive=name))
    chunks = _equations(rule, inputs, segments, state.dtype)
    inverted = inverse(chunks.lower).astype(rule.dtype)
    states = state[None]
    if chunks.lower.shape[0] != 1:
        w, y = (_times(rule, "...ij,...jk->...ik", inverted, x) for x in (chunks.erase, chunks.values))
        added = _plus(_times(rule, "...ji,...jk->...ik", chunks.write, y), chunks.state)
        states, final = _scan(rule, chunks.total, chunks.write, w, added, state, reverse=False)
    o, last = _apply(rule, chunks, inverted, states)
    if chunks.lower.shape[0] == 1:
        final = last[0]
    return (_unchunk(o).astype(inputs["v"].dtype), final), (inputs, segments, states, inverted)


def _backward(rule, residuals, cotangents):
    # The barrier keeps the compiler from storing what the forward pass computed instead of recomputing it.
    (inputs, segments, states, inverted), (do, dfinal) = jax.lax.optimization_barrier((residuals, cotangents))
    do = _chunk(do, rule.chunk)
    chunks, equations_vjp = jax.vjp(lambda x: _equations(rule, x, segments, dfinal.dtype), inputs)
    dstates = dfinal[None]
    if chunks.lower.shape[0] != 1:
        w = _times(rule, "...ij,...jk->...ik", inverted, chunks.erase)
        read = chunks.query + _times(rule, "...ij,...jk->...ik", chunks.scores, w)
        added = _times(rule, "...ji,...jk->...ik", read, do)
        dstates, dstate = _scan(rule, chunks.total, w, chunks.write, added, dfinal, reverse=True)
    (o, leaving), apply_vjp = jax.vjp(lambda x, s: _apply(rule, x, inverted, s), chunks, states)
    dchunks, dentering = apply_vjp((do.astype(o.dtype), dstates.astype(leaving.dtype)))
    if chunks.lower.shape[0] == 1:
        dstate = dentering[0]
    return *equations_vjp(dchunks), None, dstate


_chunked.defvjp(promoting(_forward), promoting(_backward))
_compiled = jax.jit(_chunked, static_argnums=0)


def _scan(rule, total, left, right, added, state, reverse):
    """The states that enter chunks, as operands of products, and the last, by S <- (total + left^T right) S + added.

    With `reverse` they are gradients of states, which start at the end and pass the transposed transition.
    """
    transition = _times(rule, "...ji,...jk->...ik", left, right)

    def step(carry, chunk):
        state, rounded = carry
        total, transition, added = chunk
        state = total * state + product("...ij,...jk->...ik", transition, rounded, rule.dtype) + added
        return (state, state.astype(rule.dtype)), rounded

    (final, _), states = jax.lax.scan(
        step, (state, state.astype(rule.dtype)), (total, transition, added), reverse=reverse
    )
    return states, final


def _apply(rule, chunks, inverted, states):
    """The outputs of the chunks, and the states that leave them, from the states that enter them."""
    right = (chunks.values + _times(rule, "...ij,...jk->...ik", chunks.erase, states)).astype(rule.dtype)
    y = solve(chunks.lower, inverted, right, rule.dtype)
    o = _times(rule, "...ij,...jk->...ik", chunks.query, states).astype(chunks.values.dtype)
    o += _times(rule, "...ij,...jk->...ik", chunks.scores, y)
    leaving = chunks.total * states + product("...ji,...jk->...ik", chunks.write, y, rule.dtype)
    return _plus(o, chunks.output), _plus(leaving, chunks.state)


def _times(rule, spec, a, b):
    """A product whose result is rounded, because it is an operand of others or one of several terms."""
    return product(spec, a, b, rule.dtype, rule.dtype)


def _equations(rule, inputs, segments, dtype):
    """`Chunks` from the arguments."""
    x = {name: array.astype(dtype) for name, array in inputs.items() if array is not None}
    log_decay = x.pop("log_decay", jnp.zeros((1, *inputs["v"].shape[1:2], 1), dtype))
    if segments is not None:
        padding, start = ~segments.real, reset_mask(segments)

        def where(mask, value, array):
            return jnp.where(mask.reshape(*mask.shape, *[1] * (array.ndim - 2)), value, array)

        x = {name: where(padding, 0, array) for name, array in x.items()}
        log_decay = where(padding, 0, log_decay)
        if start is not None:
            log_decay = where(start, RESET, log_decay)
            if rule.general:  # reads before the decay
                x["a"] = where(start, 0, x["a"])
    if rule.normalize_qk:
        for name in ("q", "k"):
            x[name] *= jax.lax.rsqrt(jnp.sum(x[name] * x[name], axis=-1, keepdims=True) + 1e-6)
    group = inputs["v"].shape[2] // inputs["k"].shape[2]
    x |= {name: jnp.repeat(x[name], group, axis=2) for name in ("q", "k")}
    x = {name: _chunk(array, rule.chunk) for name, array in x.items()}
    # What decays more than a reset is 0 as well, and an infinity would give 0 x inf = NaN.
    log_decay = jnp.maximum(log_decay if log_decay.ndim == 4 else log_decay[..., None], RESET)
    log_decay = _chunk(log_decay, rule.chunk)
    k, v, query = x["k"], x["v"], rule.scale * x["q"]
    erase, columns = (x["a"], [x["b"], k]) if rule.general else (k, [k])
    erased, read, sums = scores(erase, query, columns, log_decay, rule.general, rule.dtype)
    read_decay, write_decay = jnp.exp(sums.before + log_decay), jnp.exp(sums.after)
    total = jnp.swapaxes(read_decay[..., -1:, :], -1, -2)
    decayed_query = (query * read_decay).astype(rule.dtype)
    if not rule.general:
        beta = x["beta"][..., None]
        erase, write = -beta * read_decay * k, k * write_decay
        return Chunks(
            lower=beta * erased[0],
            values=beta * v,
            erase=erase.astype(rule.dtype),
            query=decayed_query,
            scores=read[0].astype(rule.dtype),
            output=None,
            total=total,
            write=write.astype(rule.dtype),
            state=None,
        )
    return Chunks(
        lower=-erased[0],
        values=product("...ij,...jk->...ik", erased[1], v, rule.dtype),
        erase=(jnp.exp(sums.before) * erase).astype(rule.dtype),
        query=decayed_query,
        scores=read[0].astype(rule.dtype),
        output=product("...ij,...jk->...ik", read[1], v, rule.dtype),
        total=total,
        write=(x["b"] * write_decay).astype(rule.dtype),
        state=product("...ji,...jk->...ik", k * write_decay, v, rule.dtype),
    )


def _plus(x, y):
    return x if y is None else x + y


def _chunk(x, size):
    """(b, t, h, ...) to (n, b, h, c, ...)."""
    x = x.reshape(x.shape[0], x.shape[1] // size, size, *x.shape[2:])
    return jnp.moveaxis(x, (1, 3), (0, 2))


def _unchunk(x):
    """(n, b, h, c, v) to (b, t, h, v)."""
    x = jnp.moveaxis(x, (0, 2), (1, 3))
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])
