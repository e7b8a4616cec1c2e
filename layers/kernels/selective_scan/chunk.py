"""The inside of a chunk of `selective_scan`: layout, and the recurrence over steps and blocks.

States have the axes (b, block, g, n, r) with d = g r. Quantities of a step have the same axes, of size 1 where they do
not depend on one. Lists run over the steps of a block, and each operation on an entry serves all blocks at once.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Series(NamedTuple):
    """The arguments with a time axis (axis 1), or their gradients."""

    x: jax.Array
    dt: jax.Array
    b: jax.Array
    c: jax.Array
    gate: jax.Array | None
    start: jax.Array | None
    padding: jax.Array | None


class Parameters(NamedTuple):
    """The arguments without a time axis: a (1, 1, g, n, r), skip and dt_bias (1, 1, g, 1, r)."""

    a: jax.Array
    skip: jax.Array | None
    dt_bias: jax.Array | None


class Steps(NamedTuple):
    """What the recurrence reads, as lists over the steps of a block."""

    x: list[jax.Array]
    dt: list[jax.Array]
    inputs: list[jax.Array]
    b: list[jax.Array]
    c: list[jax.Array]
    start: list[jax.Array] | None
    padding: list[jax.Array] | None


def pad_time(series, time):
    """Returns every array extended to `time` steps with padding tokens."""
    short = series.x.shape[1]
    if short == time:
        return series
    if series.padding is None:
        series = series._replace(padding=jnp.zeros_like(series.x[:, :, 0], bool))
    longer = jax.tree.map(lambda v: extend(v, time), series)
    return longer._replace(padding=longer.padding | (jnp.arange(time) >= short)[None])


def extend(v, time):
    """Returns v with zeros appended along axis 1, to `time` steps."""
    return jnp.pad(v, ((0, 0), (0, time - v.shape[1])) + ((0, 0),) * (v.ndim - 2))


def cut(v, i, size):
    """Returns chunk i of `size` steps of v."""
    return jax.lax.dynamic_slice_in_dim(v, i * size, size, axis=1)


def put(v, steps, i):
    """Returns v with a list over steps written into chunk i."""
    chunk = jnp.stack(steps, axis=2)
    chunk = chunk.reshape(v.shape[0], -1, *chunk.shape[3:])
    chunk = chunk.reshape(v.shape[0], -1, *v.shape[2:]).astype(v.dtype)
    return jax.lax.dynamic_update_slice_in_dim(v, chunk, i * chunk.shape[1], axis=1)


def _by_step(v, block):
    """(b, time, ...) to a list over steps of (b, block, ...)."""
    v = v.reshape(v.shape[0], -1, block, *v.shape[2:])
    return [v[:, :, q] for q in range(block)]


def by_channel(v, like, block):
    """(b, time, d) to a list over steps of (b, block, g, 1, r), in the type and groups of the parameter `like`."""
    groups, rest = like.shape[2], like.shape[4]
    v = v.reshape(*v.shape[:2], groups, rest)[:, :, :, None]
    return [step.astype(like.dtype) for step in _by_step(v, block)]


def _by_state(v, dtype, block):
    """(b, time, g, n) to a list over steps of (b, block, g, n, 1)."""
    return [step.astype(dtype)[..., None] for step in _by_step(v, block)]


def _flags(v, block):
    """(b, time) to a list over steps of (b, block, 1, 1, 1)."""
    return None if v is None else [step[..., None, None, None] for step in _by_step(v, block)]


def parameters(a, skip, dt_bias, groups, dtype):
    """Returns the parameters in the layout of a chunk."""
    channels, n = a.shape
    a = a.astype(dtype).reshape(1, 1, groups, channels // groups, n).swapaxes(3, 4)
    rows = (None if v is None else v.astype(dtype).reshape(1, 1, groups, 1, -1) for v in (skip, dt_bias))
    return Parameters(a, *rows)


def prepare(part, parameters, softplus, block):
    """Returns the steps of a chunk, with padding turned into steps that change nothing."""
    a, bias = parameters.a, parameters.dt_bias
    padding, start = _flags(part.padding, block), _flags(part.start, block)
    x, dt = by_channel(part.x, a, block), by_channel(part.dt, a, block)
    if bias is not None:
        dt = [v + bias for v in dt]
    if softplus:
        dt = [jax.nn.softplus(v) for v in dt]
    x, dt, b, c = (
        on_padding(v, padding, 0)
        for v in (x, dt, _by_state(part.b, a.dtype, block), _by_state(part.c, a.dtype, block))
    )
    x, dt, inputs = jax.lax.optimization_barrier((x, dt, [u * v for u, v in zip(dt, x, strict=True)]))
    return Steps(x, dt, inputs, b, c, start, padding)


def on_padding(values, padding, fill):
    """Returns a list over steps with `fill` in place of the entries that belong to padding."""
    if padding is None:
        return values
    return [jnp.where(p, fill, v) for v, p in zip(values, padding, strict=True)]


def decayed(steps, a, q, h):
    """exp(dt a) h of step q; zero where a segment starts, whatever h is."""
    h = jnp.exp(steps.dt[q] * a) * h
    return h if steps.start is None else jnp.where(steps.start[q], 0, h)


def total_decay(steps, a):
    """The product of the decays of each block; zero where a segment starts in it."""
    total = jnp.exp(sum(steps.dt) * a)
    return (
        total if steps.start is None else jnp.where(functools.reduce(jnp.logical_or, steps.start), 0, total)
    )


def states(steps, a, h):
    """h_t per step, for blocks that begin with the states h."""
    out = []
    for q, (inputs, b) in enumerate(zip(steps.inputs, steps.b, strict=True)):
        h = decayed(steps, a, q, h) + inputs * b
        out.append(h)
    return out


def adjoints(steps, a, dp, g):
    """g_t = dL/dh_t per step and the gradient of the state before the block, from that of the state after it."""
    out = []
    for q in reversed(range(len(dp))):
        out.append(g + dp[q] * steps.c[q])
        g = decayed(steps, a, q, out[-1])
    return out[::-1], g


def across_blocks(totals, ends, h, packed):
    """h -> total h + end, block after block: the value before each block, and the value after the last.

    With `packed`, where a total may be a reset, a total of zero forgets h even if h is infinite.
    """
    before = []
    for i in range(totals.shape[1]):
        before.append(h)
        carried = totals[:, i] * h
        h = (jnp.where(totals[:, i] == 0, 0, carried) if packed else carried) + ends[:, i]
    return jnp.stack(before, axis=1), h


def add_up(values, axis):
    """Returns the sum of each array along `axis`, which keeps size 1.

    On accelerators one operation serves all arrays, so that what they have in common is computed once and never written
    out. Compiled for a CPU such an operation is slower than separate sums.
    """

    def together(values):
        zeros = (jnp.zeros((), values[0].dtype),) * len(values)
        sums = jax.lax.reduce(tuple(values), zeros, lambda p, q: tuple(map(jnp.add, p, q)), (axis,))
        return [jnp.expand_dims(v, axis) for v in sums]

    def separately(values):
        return [v.sum(axis, keepdims=True) for v in values]

    return jax.lax.platform_dependent(values, cpu=separately, default=together)


def state_in(state, groups):
    """(b, d, n) to (b, g, n, r)."""
    batch, channels, n = state.shape
    return state.reshape(batch, groups, channels // groups, n).swapaxes(2, 3)


def state_out(state):
    """(b, g, n, r) to (b, d, n)."""
    batch, groups, n, rest = state.shape
    return state.swapaxes(2, 3).reshape(batch, groups * rest, n)
