"""The kernels of `tpu`: one block of time and channels, some steps at a time.

Inputs, and in the backward pass the gradients dp, stand in VMEM in float32 beside the steps that border on them, so that a tap
is a read some rows further.
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

    @pl.when(pl.program_id(2) == 0)
    def _():
        window[:EDGE] = state[...]

    _spread(rows, marks, 0)
    for start in range(0, settings.steps, settings.group):
        at = slice(start, start + settings.group)
        window[EDGE + at.start : EDGE + at.stop] = x[at].astype(jnp.float32)
        before = _reach(rows, at, settings.lanes)
        p = _before_activation(_taps(window, at, weight.shape[0], before), weight, bias)
        if settings.silu:
            p = p * jax.nn.sigmoid(p)
        y[at] = _real(p, before).astype(y.dtype)
    window[:EDGE] = window[settings.steps :]


def backward(
    settings, x, weight, bias, state, marks, edge, dy, dx, dstate, sums, window, ahead, totals, before, behind
):
    """Computes one block backward, blocks in descending order; `edge` has the steps before it."""
    (x,), (weight,), (state,), (edge,), (dy,), (dx,), (dstate,), (sums,) = (
        x,
        weight,
        state,
        edge,
        dy,
        dx,
        dstate,
        sums,
    )
    (window,), (ahead,), (totals,) = window, ahead, totals
    taps, steps = weight.shape[0], settings.steps
    place = pl.num_programs(2) - 1 - pl.program_id(2)

    @pl.when(pl.program_id(2) == 0)
    def _():
        ahead[steps:] = jnp.zeros_like(ahead[steps:])
        totals[...] = jnp.zeros_like(totals)

    @pl.when(pl.program_id(2) != 0)
    def _():
        ahead[steps:] = ahead[:EDGE]

    window[:EDGE] = jnp.where(place == 0, state[...], edge[...].astype(jnp.float32)[BEFORE - EDGE :])
    _spread(before, marks, 0)
    _spread(behind, marks, 1)
    for start in range(0, steps, settings.group):
        at = slice(start, start + settings.group)
        inputs, dp = x[at].astype(jnp.float32), dy[at].astype(jnp.float32)
        reach = _reach(before, at, settings.lanes)
        if settings.time % steps:
            step = place * steps + start + jax.lax.broadcasted_iota(jnp.int32, dp.shape, 0)
            inputs, dp = (jnp.where(step < settings.time, v, 0) for v in (inputs, dp))
        window[EDGE + at.start : EDGE + at.stop] = inputs
        reached = _taps(window, at, taps, reach)
        if settings.silu:
            p = _before_activation(reached, weight, bias)
            slope = jax.nn.sigmoid(p)
            dp = dp * (slope * (1 + p * (1 - slope)))
        dp = _real(dp, reach)
        ahead[at] = dp
        for k, v in enumerate([*(dp * v for v in reached), dp]):
            totals[k] += sum(v[i : i + SUBLANES] for i in range(0, settings.group, SUBLANES))
    for start in range(0, steps, settings.group):
        at = slice(start, start + settings.group)
        reach = _reach(behind, at, settings.lanes)
        later = (_within(ahead[at.start + k : at.stop + k], reach, k) for k in range(taps))
        dx[at] = sum(weight[taps - 1 - k : taps - k] * v for k, v in enumerate(later)).astype(dx.dtype)

    @pl.when(place == 0)
    def _():
        sums[...] = totals[...].sum(axis=1)
        reach = _reach(before, slice(0, EDGE), settings.lanes)
        total = jnp.zeros_like(dstate)
        for k in range(1, taps):
            head = _within(ahead[:EDGE], reach, k)
            joined = jnp.concatenate([jnp.zeros_like(head), head])[k : k + EDGE]
            total += weight[taps - 1 - k : taps - k] * joined
        dstate[...] = total


def _before_activation(reached, weight, bias):
    p = sum(weight[k : k + 1] * v for k, v in enumerate(reached))
    return p + bias[0][...] if bias else p


def _taps(window, at, taps, reach):
    """What each tap reads at steps `at`, oldest first."""
    shifts = range(taps - 1, -1, -1)
    return [_within(window[EDGE + at.start - k : EDGE + at.stop - k], reach, k) for k in shifts]


def _within(v, reach, k):
    """v where a tap may reach k steps away, else 0."""
    return v if reach is None else jnp.where(reach >= k, v, 0)


def _real(v, reach):
    return v if reach is None else jnp.where(reach >= 0, v, 0)


def _reach(rows, at, lanes):
    """How far the taps of steps `at` may reach, the same in every lane; None if that is everywhere."""
    if not rows:
        return None
    reach = rows[0][at]
    return jnp.concatenate([reach] * (lanes // reach.shape[1]), axis=1)


def _spread(rows, marks, which):
    """Turns a row of the marks of a block from lanes to sublanes."""
    for target, source in zip(rows, marks, strict=True):
        for start in range(0, target.shape[0], mosaic_tpu.LANES):
            at = slice(start, min(start + mosaic_tpu.LANES, target.shape[0]))
            values = column(source[which : which + 1, at])
            target[at] = jnp.broadcast_to(values, (values.shape[0], target.shape[1]))
