"""`short_conv` in plain JAX: a sum of shifted copies, with its own backward pass.

Shifts, products, bias and activation are elementwise and fuse into one pass that reads x and writes y; a library
convolution with one channel per group would be many times slower on a GPU. If padding may stand anywhere, the shifts become
gathers of rows (see `taps`), still in one pass. The backward pass recomputes the pre-activation p and stores dp once,

    dp_t = dy_t activation'(p_t),   dx_s = sum_k weight_{w-1-k} dp_{s+k},   dweight_{w-1-k} = sum_t dp_t x_{t-k}.

Numbers moved per token and channel, as compiled for a GPU at width 4: 2 forward; 9 backward, where 3 are the least (the
compiler makes three passes over dp and x for the five sums).
"""

import functools

import jax
import jax.numpy as jnp

from layers.kernels.checks import accumulation_dtype
from layers.kernels.isolation import times
from layers.kernels.promotion import promoting
from layers.kernels.shard_map_types import vary_like
from layers.kernels.short_conv.taps import Beside, Scattered, Whole


def short_conv(x, weight, bias, activation, initial_state, segments):
    """Returns outputs and the final state; the public function has checked the arguments."""
    dtype = accumulation_dtype(x, weight, bias, initial_state)
    if initial_state is None:
        shape = (x.shape[0], weight.shape[0] - 1, x.shape[2])
        initial_state = jnp.zeros_like(jnp.broadcast_to(x[:, :1], shape))
    weight, bias, state = jax.tree.map(lambda v: vary_like(v, x), (weight, bias, initial_state.astype(dtype)))
    return _compiled(x, weight, bias, state, segments, activation)


@functools.partial(jax.jit, static_argnums=5)
def _compiled(x, weight, bias, state, segments, activation):
    return _convolution(x, weight, bias, state, segments, activation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _convolution(x, weight, bias, state, segments, activation):
    return _forward(x, weight, bias, state, segments, activation)[0]


def _forward(x, weight, bias, state, segments, activation):
    taps = _taps(x, weight, segments)
    y = _before_activation(taps, x, weight, bias, state)
    if activation == "silu":
        y = jax.nn.silu(y)
    final = taps.last(x).astype(state.dtype) + taps.remaining(state)
    return (taps.real(y).astype(x.dtype), final), (x, weight, bias, state, segments)


def _taps(x, weight, segments):
    memory = weight.shape[0] - 1
    if segments is None:
        return Whole(x.shape[1], memory)
    return Beside(segments, memory) if segments.padding == "end" else Scattered(segments, memory)


def _before_activation(taps, x, weight, bias, state):
    rows = _rows(weight, state.dtype)
    p = taps.from_first(sum(r * v for r, v in zip(rows[:-1], _slides(state), strict=True)))
    for k, row in enumerate(reversed(rows)):
        p = p + row * taps.earlier(x, k).astype(state.dtype)
    return p if bias is None else p + bias.astype(state.dtype)[None, None]


def _rows(weight, dtype):
    return [row.astype(dtype)[None, None] for row in weight]


def _slides(state):
    """The state as the taps i = 0 .. m - 1 of the first tokens see it: entry r of slide i is state_{r+i}."""
    memory = state.shape[1]
    return [Whole(memory, memory).later(state, i) for i in range(memory)]


def _backward(activation, residuals, cotangents):
    x, weight, bias, state, segments = residuals
    dy, dfinal = cotangents
    dtype, memory = state.dtype, state.shape[1]
    taps, rows = _taps(x, weight, segments), _rows(weight, state.dtype)
    dp, p = dy.astype(dtype), _before_activation(taps, x, weight, bias, state)
    if activation == "silu":
        slope = jax.nn.sigmoid(p)
        dp = dp * (slope * (1 + p * (1 - slope)))
    # An output that is not finite has no gradient.
    dp = jnp.where(jnp.isfinite(p), dp, 0)
    # Written once, in the type of x, and read by everything below.
    dp = jax.lax.optimization_barrier(taps.real(dp).astype(x.dtype))

    dx = taps.from_last(dfinal)
    for k, row in enumerate(reversed(rows)):
        dx = dx + row * taps.later(dp, k).astype(dtype)
    dhead = taps.first(dp).astype(dtype)
    dstate = taps.from_remaining(dfinal)
    for i, row in enumerate(rows[:-1]):
        dstate = dstate + row * Whole(memory, memory).earlier(dhead, i)

    dp = dp.astype(dtype)
    over_tokens = [times(dp, taps.earlier(x, k).astype(dtype)) for k in reversed(range(memory + 1))]
    *dweight, dbias = (v.sum((0, 1)) for v in [*over_tokens, dp])
    over_state = [times(dhead, s).sum((0, 1)) for s in _slides(state)]
    dweight = [*(v + s for v, s in zip(dweight, over_state, strict=False)), dweight[-1]]
    dweight = jnp.stack(dweight).astype(weight.dtype)
    return dx.astype(x.dtype), dweight, None if bias is None else dbias.astype(bias.dtype), dstate, None


_convolution.defvjp(promoting(_forward), promoting(_backward))
