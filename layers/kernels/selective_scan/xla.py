"""`selective_scan` in plain JAX: blocks inside chunks, with its own backward pass.

Time is cut into chunks, which run one after the other, and a chunk into blocks of a few steps, which run side by side.
Within a chunk a first pass reduces every block to what it adds to a state (its decay is exp(a sum dt)). A short recurrence
over the blocks gives the state before each of them. A last pass runs through all blocks at once and computes the output.
Steps are unrolled as elementwise operations on slices, and all sums over the state axis (or over the channels) are one
operation with many operands, so that XLA keeps the states of a block in registers. Nothing of size (b, t, d, n) exists: the
largest array has one state per block of one chunk.

The forward pass keeps the states at the chunk borders. The backward pass takes the chunks in reverse order, recomputes
the states inside, and runs the adjoint recurrence

    g_t = c_t dp_t + exp(dt_{t+1} a) g_{t+1},

where dp is the gradient of the output before the gate. With w_t = g_t exp(dt_t a) h_{t-1}:

    dx_t = dt_t sum_n(g_t b_t) + skip dp_t        ddt_t = x_t sum_n(g_t b_t) + sum_n(w_t a)
    db_t = sum_d(g_t dt_t x_t)                    dc_t = sum_d(dp_t h_t)               da = sum_t(w_t dt_t)

States have the axes (b, block, g, n, r), d = g r: on a GPU the sum over n is a loop of one thread, and the sum over
channels runs along memory. The states kept for the backward pass are 4 n bytes per channel and chunk.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels.checks import accumulation_dtype
from layers.kernels.isolation import times
from layers.kernels.promotion import promoting
from layers.kernels.segments import reset_mask
from layers.kernels.selective_scan import chunk
from layers.kernels.shard_map_types import vary_like
from layers.kernels.sizes import at_most, known

# Steps per block, unrolled: on a CPU more than 4 take long to compile.
MAX_BLOCK = 8
BLOCK = {"cpu": 4}
# Blocks per chunk, run side by side: 4, or on a device with many threads up to 16 where rows and channels are few.
BLOCKS = 4
MAX_BLOCKS = 16
THREADS = 2**17


class _Options(NamedTuple):
    softplus: bool
    block: int
    blocks: int


def selective_scan(
    x, dt, a, b, c, skip, gate, dt_bias, dt_softplus, initial_state, segments, block=None, blocks=None
):
    """Returns the outputs and the final state; the public function has checked the arguments."""
    dtype = accumulation_dtype(x, dt, a, b, c, skip, gate, dt_bias, initial_state)
    batch, time, channels = x.shape
    if initial_state is None:
        shape = (batch, channels, a.shape[1])
        initial_state = jnp.zeros_like(jnp.broadcast_to(x[:, 0, :, None], shape), dtype)
    start = padding = None
    if segments is not None:
        start, padding = reset_mask(segments), ~segments.real
    backend = jax.default_backend()
    block = at_most(block or BLOCK.get(backend, MAX_BLOCK), time)
    if blocks is None:
        blocks = BLOCKS
        if backend != "cpu" and known(batch):
            blocks = min(max(THREADS // max(batch * channels, 1), BLOCKS), MAX_BLOCKS)
    options = _Options(dt_softplus, block, at_most(blocks, -(-time // block)))
    a, b, c, skip, dt_bias, state = jax.tree.map(
        lambda v: vary_like(v, x), (a, b, c, skip, dt_bias, initial_state.astype(dtype))
    )
    series = chunk.Series(x, dt, b, c, gate, start, padding)
    return _compiled(series, chunk.Parameters(a, skip, dt_bias), state, options)


@functools.partial(jax.jit, static_argnums=3)
def _compiled(series, parameters, state, options):
    return _scan(series, parameters, state, options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scan(series, parameters, state, options):
    return _run(series, parameters, state, options)[:2]


def _run(series, parameters, state, options):
    """The outputs, the final state and the states at the chunk borders."""
    time, groups, dtype = series.x.shape[1], series.b.shape[2], state.dtype
    size = options.block * options.blocks
    count = -(-time // size)
    series = chunk.pad_time(series, count * size)
    a, skip, _ = parameters = chunk.parameters(*parameters, groups, dtype)

    def one(i, carry):
        h, y, borders = carry
        borders = jax.lax.dynamic_update_index_in_dim(borders, h, i, axis=0)
        part = jax.tree.map(lambda v: chunk.cut(v, i, size), series)
        steps = chunk.prepare(part, parameters, options.softplus, options.block)
        ends = chunk.states(steps, a, jnp.zeros_like(h[:, None]))[-1]
        before, h = chunk.across_blocks(chunk.total_decay(steps, a), ends, h, steps.start is not None)
        states = chunk.states(steps, a, before)
        out = chunk.add_up(_times(states, steps.c), axis=3)
        if skip is not None:
            out = _plus(out, [skip * x for x in steps.x])
        if part.gate is not None:
            out = _times(out, [jax.nn.silu(z) for z in chunk.by_channel(part.gate, a, options.block)])
        return h, chunk.put(y, chunk.on_padding(out, steps.padding, 0), i), borders

    h = chunk.state_in(state, groups)
    borders = jnp.zeros_like(jnp.broadcast_to(h[None], (count, *h.shape)))
    h, y, borders = jax.lax.fori_loop(0, count, one, (h, jnp.zeros_like(series.x), borders))
    return y[:, :time], chunk.state_out(h), borders


def _forward(series, parameters, state, options):
    y, final, borders = _run(series, parameters, state, options)
    return (y, final), (series, parameters, borders)


def _backward(options, residuals, cotangents):
    arguments, parameter_arguments, borders = residuals
    dy, dfinal = cotangents
    time, groups, dtype = dy.shape[1], arguments.b.shape[2], borders.dtype
    size = options.block * options.blocks
    count = borders.shape[0]
    series, dy = chunk.pad_time(arguments, count * size), chunk.extend(dy, count * size)
    parameters = chunk.parameters(*parameter_arguments, groups, dtype)

    def one(j, carry):
        g, sums, gradients = carry
        i = count - 1 - j
        part, dout = jax.tree.map(lambda v: chunk.cut(v, i, size), (series, dy))
        g, new, summands = _chunk_gradients(part, dout, parameters, borders[i], g, options)
        # `new` has a list over steps where `gradients` has an array.
        gradients = jax.tree.map(lambda full, steps: chunk.put(full, steps, i), gradients, new)
        return g, jax.tree.map(jnp.add, sums, summands), gradients

    g = chunk.state_in(dfinal.astype(dtype), groups)
    sums = chunk.Parameters(g, *(None if v is None else g[:, :, :1] for v in parameters[1:]))
    sums, gradients = jax.tree.map(jnp.zeros_like, (sums, series._replace(start=None, padding=None)))
    g, sums, gradients = jax.lax.fori_loop(0, count, one, (g, sums, gradients))
    gradients = jax.tree.map(lambda v: v[:, :time], gradients)
    da, *rows = jax.tree.map(lambda v: chunk.state_out(v).sum(0), sums)
    sums = chunk.Parameters(da, *(None if v is None else v[:, 0] for v in rows))
    sums = jax.tree.map(lambda v, parameter: v.astype(parameter.dtype), sums, parameter_arguments)
    return gradients, sums, chunk.state_out(g)


def _chunk_gradients(part, dout, parameters, h, g, options):
    """Returns the gradients of a chunk, from the state before it and the gradient of the state after it.

    They are the gradient of the state before it, those of the series as lists over steps, and those of the parameters as
    (b, g, n, r) and (b, g, 1, r).
    """
    a, skip, bias = parameters
    block = options.block
    steps = chunk.prepare(part, parameters, options.softplus, block)
    dout = dp = chunk.by_channel(dout, a, block)
    if part.gate is not None:
        gate = chunk.by_channel(part.gate, a, block)
        dp = _times(dout, [jax.nn.silu(z) for z in gate])
    dp = jax.lax.optimization_barrier(chunk.on_padding(dp, steps.padding, 0))

    # The state before each block and the gradient that reaches it from later blocks, then all steps of all blocks.
    totals, zero = chunk.total_decay(steps, a), jnp.zeros_like(g[:, None])
    ends, leads = chunk.states(steps, a, zero)[-1], chunk.adjoints(steps, a, dp, zero)[1]
    packed = steps.start is not None
    before, _ = chunk.across_blocks(totals, ends, h, packed)
    after, g = chunk.across_blocks(totals[:, ::-1], leads[:, ::-1], g, packed)
    states = chunk.states(steps, a, before)
    adjoints, _ = chunk.adjoints(steps, a, dp, after[:, ::-1])
    decayed = [chunk.decayed(steps, a, q, h) for q, h in enumerate([before, *states[:-1]])]
    w = [times(g, h) for g, h in zip(adjoints, decayed, strict=True)]

    over_n = _times(adjoints, steps.b) + [v * a for v in w]
    if part.gate is not None:
        over_n += _times(states, steps.c)
    over_n = chunk.add_up(over_n, axis=3)
    over_channels = chunk.add_up(_times(adjoints, steps.inputs) + _times(states, dp), axis=4)
    da = jax.lax.optimization_barrier(sum(_times(w, steps.dt))).sum(1)

    du, ddt = over_n[:block], over_n[block : 2 * block]
    dx = _times(du, steps.dt)
    ddt = _plus(ddt, _times(du, steps.x))
    if options.softplus:
        # The slope of softplus is the logistic function, 1 - exp(-softplus).
        ddt = [v * -jnp.expm1(-dt) for v, dt in zip(ddt, steps.dt, strict=True)]
    ddt = chunk.on_padding(ddt, steps.padding, 0)
    dbias = None if bias is None else sum(ddt).sum(1)
    dskip = dgate = None
    if skip is not None:
        dx = _plus(dx, [skip * v for v in dp])
        dskip = sum(_times(dp, steps.x)).sum(1)
    if part.gate is not None:
        out = over_n[2 * block :]
        if skip is not None:
            out = _plus(out, [skip * v for v in steps.x])
        dgate = _times(_times(dout, out), [_silu_slope(z) for z in gate])
        dgate = chunk.on_padding(dgate, steps.padding, 0)
    dx = chunk.on_padding(dx, steps.padding, 0)
    gradients = chunk.Series(dx, ddt, over_channels[:block], over_channels[block:], dgate, None, None)
    return g, gradients, chunk.Parameters(da, dskip, dbias)


_scan.defvjp(promoting(_forward), promoting(_backward))


def _times(values, factors):
    return [u * v for u, v in zip(values, factors, strict=True)]


def _plus(values, others):
    return [u + v for u, v in zip(values, others, strict=True)]


def _silu_slope(z):
    s = jax.nn.sigmoid(z)
    return s * (1 + z * (1 - s))
