"""The kernels of `tpu`: one block of time and channels, one register of channels and some steps at a time.

Inputs, and in the backward pass the gradients dp, stand in VMEM in float32 beside the steps that border on them, so that a tap
is a read some rows further. Where a row is one register wide, rows follow each other in memory and such a read is one load.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from layers.kernels import mosaic_tpu
from layers.kernels.mosaic_tpu import SUBLANES, column

# Steps kept beside a block, as many as the longest taps reach rounded up to a tile, and those read before it, a multiple of the
# sublanes of a bfloat16 tile.
EDGE, BEFORE = 8, 16


def forward(settings, x, weight, bias, state, marks, y, window, rows):
    """Computes one block forward. References come in groups, as `mosaic_tpu.call` gives them."""
    (x,), (weight,), (state,), (y,), (window,) = x, weight, state, y, window
    first = pl.program_id(2) == 0
    _spread(rows, marks, 0)

    def compute(part, lanes):
        weights, biases = weight[:, lanes], [v[:, lanes] for v in bias]

        @pl.when(first)
        def _():
            window[part, :EDGE] = state[:, lanes]

        for at in _groups(settings):
            window[part, EDGE + at.start : EDGE + at.stop] = x[at, lanes].astype(jnp.float32)
            reach = _reach(rows, at)
            p = _before_activation(_taps(window, part, at, len(weights), reach), weights, biases)
            if settings.silu:
                p = p * _sigmoid(p)
            y[at, lanes] = _real(p, reach).astype(y.dtype)
        window[part, :EDGE] = window[part, settings.steps :]

    _for_parts(settings, compute)


def backward(
    settings, x, weight, bias, state, marks, edge, dy, dx, dstate, sums, window, ahead, totals, before, behind
):
    """Computes one block backward, blocks in descending order; `edge` has the steps before it."""
    (x,), (weight,), (state,), (edge,), (dy,) = x, weight, state, edge, dy
    (dx,), (dstate,), (sums,), (window,), (ahead,), (totals,) = dx, dstate, sums, window, ahead, totals
    taps, steps = weight.shape[0], settings.steps
    place = pl.num_programs(2) - 1 - pl.program_id(2)

    @pl.when(pl.program_id(2) == 0)
    def _():
        ahead[:, steps:] = jnp.zeros_like(ahead[:, steps:])
        totals[...] = jnp.zeros_like(totals)

    @pl.when(pl.program_id(2) != 0)
    def _():
        ahead[:, steps:] = ahead[:, :EDGE]

    _spread(before, marks, 0)
    _spread(behind, marks, 1)

    def compute(part, lanes):
        weights, biases = weight[:, lanes], [v[:, lanes] for v in bias]
        window[part, :EDGE] = jnp.where(
            place == 0, state[:, lanes], edge[:, lanes].astype(jnp.float32)[BEFORE - EDGE :]
        )
        added = [jnp.zeros((SUBLANES, lanes.size), jnp.float32)] * (taps + 1)
        for at in _groups(settings):
            inputs, dp = (v[at, lanes].astype(jnp.float32) for v in (x, dy))
            if settings.time % steps:
                step = place * steps + at.start + jax.lax.broadcasted_iota(jnp.int32, dp.shape, 0)
                inputs, dp = (jnp.where(step < settings.time, v, 0) for v in (inputs, dp))
            window[part, EDGE + at.start : EDGE + at.stop] = inputs
            reach = _reach(before, at)
            reached = _taps(window, part, at, taps, reach)
            if settings.silu:
                p = _before_activation(reached, weights, biases)
                slope = _sigmoid(p)
                dp = dp * (slope * (1 + p * (1 - slope)))
            dp = _real(dp, reach)
            ahead[part, at] = dp
            terms = [*(dp * v for v in reached), dp]
            added = [
                total + v.reshape(-1, SUBLANES, v.shape[1]).sum(0)
                for total, v in zip(added, terms, strict=True)
            ]
        for k, v in enumerate(added):
            totals[k, :, lanes] += v
        for at in _groups(settings):
            reach = _reach(behind, at)
            later = [_within(ahead[part, at.start + k : at.stop + k], reach, k) for k in range(taps)]
            dx[at, lanes] = sum(weights[taps - 1 - k][None] * v for k, v in enumerate(later)).astype(dx.dtype)

        @pl.when(place == 0)
        def _():
            reach = _reach(before, slice(0, EDGE))
            total = jnp.zeros((EDGE, weights.shape[1]), jnp.float32)
            for k in range(1, taps):
                head = _within(ahead[part, :EDGE], reach, k)
                joined = jnp.concatenate([jnp.zeros_like(head), head])[k : k + EDGE]
                total += weights[taps - 1 - k][None] * joined
            dstate[:, lanes] = total

    _for_parts(settings, compute)

    @pl.when(place == 0)
    def _():
        sums[...] = totals[...].sum(axis=1)


def _for_parts(settings, compute):
    """Calls a function with the number and the lanes of every register of channels of a block; unrolled, so that they overlap."""
    size = min(settings.lanes, mosaic_tpu.LANES)
    count = settings.lanes // size

    def step(part, _):
        compute(part, pl.ds(pl.multiple_of(part * size, size), size))

    jax.lax.fori_loop(0, count, step, None, unroll=count)


def _groups(settings):
    """The steps of a block in groups."""
    return [slice(i, i + settings.group) for i in range(0, settings.steps, settings.group)]


def _sigmoid(p):
    """The logistic function by the unit of tanh, off by at most 1e-7: a quotient takes a dozen operations."""
    return 0.5 + 0.5 * jnp.tanh(0.5 * p)


def _before_activation(reached, weights, biases):
    return sum(weights[k][None] * v for k, v in enumerate(reached)) + sum(biases)


def _taps(window, part, at, taps, reach):
    """What each tap reads at steps `at`, oldest first."""
    shifts = range(taps - 1, -1, -1)
    return [_within(window[part, EDGE + at.start - k : EDGE + at.stop - k], reach, k) for k in shifts]


def _within(v, reach, k):
    """v where a tap may reach k steps away, else 0."""
    return v if reach is None else jnp.where(reach >= k, v, 0)


def _real(v, reach):
    return v if reach is None else jnp.where(reach >= 0, v, 0)


def _reach(rows, at):
    """How far the taps of steps `at` may reach, the same in every lane; None if that is everywhere."""
    return rows[0][at] if rows else None


def _spread(rows, marks, which):
    """Turns a row of the marks of a block from lanes to sublanes."""
    for target, source in zip(rows, marks, strict=True):
        for start in range(0, target.shape[0], mosaic_tpu.LANES):
            at = slice(start, min(start + mosaic_tpu.LANES, target.shape[0]))
            values = column(source[which : which + 1, at])
            target[at] = jnp.broadcast_to(values, (values.shape[0], target.shape[1]))
