"""The kernels of `tpu`: one block of time and channels, in tiles of 8 steps.

In a tile, the decays and inputs of 1, 2 and 4 steps before are combined with a step's own. Each step then has what the tile
adds to the state, and the factor of the state that enters. That state then passes from tile to tile.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from layers.kernels.mosaic_tpu import column

TILE = 8
# Steps read from the block before; a multiple of 16, the sublanes of a bfloat16 tile.
HALO = 16
# Marks of a step: skipped, first of a segment, missing at the end of the last block.
PADDING, START, OUTSIDE = 1.0, 2.0, 3.0


def forward(settings, a, x, state, marks, h, final, carried, rows):
    """Computes one block forward. References come in groups, as `mosaic_tpu.call` gives them; complex planes are a group."""
    first, last = pl.program_id(2) == 0, pl.program_id(2) == pl.num_programs(2) - 1
    pl.when(first)(lambda: _copy(carried, state))
    _spread(rows, marks)

    def group(k, carry):
        at = _group(settings, k, descending=settings.reverse)
        decay, inputs = _tiles(a, at), _tiles(x, at)
        if rows:
            mark = _tiles(rows, at)[0][..., :1]
            decay, inputs = _passing(decay, mark), tuple(jnp.where(_skipped(mark), 0, v) for v in inputs)
        inputs = inputs + (jnp.zeros_like(inputs[0]),) * (len(h) - len(inputs))
        states, _, carry = _states(decay, inputs, carry, settings.reverse)
        for ref, plane in zip(h, states, strict=True):
            ref[at, :] = plane.reshape(settings.group, -1).astype(ref.dtype)
        return carry

    carry = jax.lax.fori_loop(0, settings.steps // settings.group, group, tuple(c[...] for c in carried))
    _copy(carried, carry)
    pl.when(last)(lambda: _copy(final, carried))


def backward(settings, a, h, state, marks, dh, dfinal, halo, da, dx, dstate, carried, sums, rows):
    """Computes one block backward; blocks come in the opposite order, `halo` has the outputs next to this one."""
    first, last = pl.program_id(2) == 0, pl.program_id(2) == pl.num_programs(2) - 1
    _spread(rows, marks)

    @pl.when(first)
    def _():
        _copy(carried, dfinal)
        for ref in sums:
            ref[...] = jnp.zeros_like(ref)

    # The step before a block is in the block before, or is the state that entered.
    edge = slice(0, 1) if settings.reverse else slice(HALO - 1, HALO)
    before_block = tuple(
        jnp.where(last, s[...], v[...].astype(jnp.float32)[edge]) for s, v in zip(state, halo, strict=True)
    )

    def outputs(at):
        planes = tuple(v[at, :].astype(jnp.float32) for v in h)
        if rows:
            outside = rows[0][at, :][:, :1] == OUTSIDE
            planes = tuple(jnp.where(outside, s[...], v) for s, v in zip(state, planes, strict=True))
        return planes

    def group(k, carry):
        at = _group(settings, k, descending=not settings.reverse)
        decay, cotangent = _tiles(a, at), _tiles(dh, at)
        mark = _tiles(rows, at)[0][..., :1] if rows else None
        if rows:
            decay = _passing(decay, mark)
            cotangent = tuple(jnp.where(mark == OUTSIDE, 0, v) for v in cotangent)
        decay = _conjugate(decay)
        passed, entering, carry = _states(decay, _times(decay, cotangent), carry, not settings.reverse)
        g = tuple(
            c + _shifted(u, e, not settings.reverse)
            for c, u, e in zip(cotangent, passed, entering, strict=True)
        )
        # The last step before this group, if it lies in the block.
        near = at.start + settings.group if settings.reverse else at.start - HALO
        inside = (near >= 0) & (near < settings.steps)
        near = pl.multiple_of(jnp.clip(near, 0, settings.steps - HALO), HALO)
        before = tuple(
            jnp.where(inside, v[edge], b)
            for v, b in zip(outputs(pl.ds(near, HALO)), before_block, strict=True)
        )
        own = tuple(v.reshape(-1, TILE, v.shape[-1]) for v in outputs(at))
        earlier = tuple(
            _shifted(v, _edges(v, b, settings.reverse), settings.reverse)
            for v, b in zip(own, before, strict=True)
        )
        ga, gx = _times(g, _conjugate(earlier))[: len(a)], g[: len(dx)]
        if rows:
            ga = tuple(jnp.where(mark != 0, 0, v) for v in ga)
            gx = tuple(jnp.where(_skipped(mark), 0, v) for v in gx)
        for ref, plane in zip(dx, gx, strict=True):
            ref[at, :] = plane.reshape(settings.group, -1).astype(ref.dtype)
        for ref, plane in zip(sums, ga, strict=False):
            ref[...] += plane.sum((0, 1))[None]
        for ref, plane in zip(() if sums else da, ga, strict=False):
            ref[at, :] = plane.reshape(settings.group, -1).astype(ref.dtype)
        return carry

    carry = jax.lax.fori_loop(0, settings.steps // settings.group, group, tuple(c[...] for c in carried))
    _copy(carried, carry)

    @pl.when(last)
    def _():
        _copy(dstate, carried)
        _copy(da if sums else (), sums)


def _copy(targets, sources):
    for target, source in zip(targets, sources, strict=True):
        target[...] = source[...]


def _spread(rows, marks):
    """Turns the marks of a block from lanes to sublanes."""
    for target, source in zip(rows, marks, strict=True):
        target[...] = jnp.broadcast_to(column(source[...]), target.shape)


def _group(settings, k, *, descending):
    count = settings.steps // settings.group
    start = (count - 1 - k if descending else k) * settings.group
    return pl.ds(pl.multiple_of(start, settings.group), settings.group)


def _tiles(refs, at):
    """Steps `at` as (tiles, 8, lanes) in float32; a single step stands for all."""
    planes = []
    for ref in refs:
        if ref.shape[0] == 1:
            planes.append(
                jnp.broadcast_to(ref[...].astype(jnp.float32), (at.size // TILE, TILE, ref.shape[1]))
            )
        else:
            planes.append(ref[at, :].astype(jnp.float32).reshape(-1, TILE, ref.shape[1]))
    return tuple(planes)


def _skipped(mark):
    return (mark == PADDING) | (mark == OUTSIDE)


def _passing(decay, mark):
    """The decay, 0 where a segment starts and 1 on padding."""
    marked = tuple(jnp.where(mark != 0, 0, v) for v in decay[1:])
    return (jnp.where(mark == START, 0, jnp.where(_skipped(mark), 1, decay[0])), *marked)


def _states(decay, inputs, carry, descending):
    """The recurrence over tiles (n, 8, d).

    Returns the states after every step, those that enter every tile, (n, 1, d), and the state that leaves the last.
    """
    decay, inputs = _doubled(decay, inputs, descending)
    count = inputs[0].shape[0]
    states, entering = [None] * count, [None] * count
    edge = slice(0, 1) if descending else slice(TILE - 1, TILE)
    for tile in reversed(range(count)) if descending else range(count):
        entering[tile] = carry
        passed = _times(tuple(v[tile] for v in decay), carry)
        states[tile] = tuple(p + v[tile] for p, v in zip(passed, inputs, strict=True))
        carry = tuple(v[edge] for v in states[tile])
    states, entering = (
        tuple(jnp.stack(planes) for planes in zip(*tiles, strict=True)) for tiles in (states, entering)
    )
    return states, entering, carry


def _doubled(decay, inputs, descending):
    """Inside every tile: the product of decays up to each step, and the state after it from zero."""
    for shift in (1, 2, 4):
        earlier_decay = (_rolled(v, shift, descending, float(k == 0)) for k, v in enumerate(decay))
        earlier = tuple(_rolled(v, shift, descending, 0.0) for v in inputs)
        inputs = tuple(v + p for v, p in zip(inputs, _times(decay, earlier), strict=True))
        decay = _times(decay, tuple(earlier_decay))
    return decay, inputs


def _rolled(v, shift, descending, missing):
    """The value `shift` steps earlier in the running direction, `missing` where that is outside the tile."""
    step = jax.lax.broadcasted_iota(jnp.int32, v.shape, 1)
    inside = step < TILE - shift if descending else step >= shift
    return jnp.where(inside, pltpu.roll(v, TILE - shift if descending else shift, 1), missing)


def _shifted(v, edges, descending):
    """The value one step earlier in the running direction, `edges` (n, 1, d) at the first step of a tile."""
    return _rolled(v, 1, descending, edges)


def _edges(v, before, descending):
    """The last steps of the tiles before each, (n, 1, d), `before` (1, d) being that before the first."""
    if descending:
        return jnp.concatenate([v[1:, :1], before[None]])
    return jnp.concatenate([before[None], v[:-1, TILE - 1 :]])


def _times(a, b):
    """The product of numbers of one (real) or two planes."""
    if len(a) == 1 or len(b) == 1:
        (factor,), planes = (a, b) if len(a) == 1 else (b, a)
        return tuple(factor * v for v in planes)
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def _conjugate(a):
    return (a[0], *(-v for v in a[1:]))
