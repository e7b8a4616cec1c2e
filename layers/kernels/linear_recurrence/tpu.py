"""`linear_recurrence` as Pallas kernels for TPUs: one pass over memory forward and one backward. Not yet run on a TPU.

The grid is batch, blocks of channels (lanes) and blocks of time, the last in order: the state stays in VMEM. Complex
numbers are two real planes. Inside a block, 8 steps (the sublanes of a register) are combined by doubling, three times
a rotation, and the state then passes from one such tile to the next. The backward pass runs the other way; with the
state's gradient u_t behind step t,

    g_t = dh_t + u_{t+1},    u_t = conj(a_t) g_t,    dx_t = g_t,    da_t = g_t conj(h_{t-1}),

needs a, the output h and, at the border of a block, 16 steps of h of the block before.

Bytes: a, x and h once forward; a, h, dh, dx and da once backward, which at 8 x 4096 x 2048 float32 is 0.8 and 1.3 GB, or
1.0 and 1.6 ms on a v5e. Arithmetic (real): 2 operations an element are needed, some 20 are done, a third of them
rotations and masks. Bytes should bound it. Segments or an odd length add a mask, one float per step, which every block of
channels reads and turns from lanes to sublanes.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from layers.kernels import mosaic_tpu
from layers.kernels.checks import accumulation_dtype
from layers.kernels.segments import segment_starts
from layers.kernels.varying import vary_as

# Steps a block of time and channels a block of lanes (half of these if complex): 0.5 MB an array, twice buffered.
STEPS, CHANNELS = 256, 512
# Steps whose tiles of 8 are combined at once, enough to hide the latency of rotations; a multiple of HALO.
GROUP = 64
# Steps read from the block before; a multiple of 16, the sublanes of a bfloat16 tile.
HALO = 16
TILE = 8

# Marks of a step: skipped, first of a segment, missing at the end of the last block.
PADDING, START, OUTSIDE = 1.0, 2.0, 3.0


class Settings(NamedTuple):
    """Direction, steps and lanes of a block, steps of a group, and the interpreter if any."""

    reverse: bool
    steps: int
    lanes: int
    group: int
    interpret: Any


def refuses(a, x, initial_state, **_):
    """Why the kernels cannot take a call, or None."""
    return mosaic_tpu.unavailable(a, x, initial_state)


def automatic(x, **_):
    """On a TPU, where a sequence fills blocks; unmeasured, so that short ones and single steps are left to XLA."""
    return mosaic_tpu.on_tpu() and x.shape[1] >= STEPS and x.shape[2] >= mosaic_tpu.LANES


def linear_recurrence(a, x, initial_state, segment_ids, reverse):
    """Runs the recurrence; the arguments are checked by the public function."""
    dtype = accumulation_dtype(a, x, initial_state)
    batch, time, width = x.shape
    state = jnp.zeros((batch, width), dtype) if initial_state is None else initial_state.astype(dtype)
    channels = CHANNELS // 2 if jnp.issubdtype(dtype, jnp.complexfloating) else CHANNELS
    settings = Settings(
        reverse,
        min(STEPS, mosaic_tpu.up(time, max(GROUP, mosaic_tpu.LANES))),
        min(channels, mosaic_tpu.up(width, mosaic_tpu.LANES)) if width > mosaic_tpu.LANES else width,
        GROUP,
        mosaic_tpu.INTERPRET,
    )
    return _run(settings, a, x, state, segment_ids)


@functools.partial(jax.jit, static_argnums=0)
def _run(settings, a, x, state, segment_ids):
    a, x, state = (vary_as(v, a, x, state) for v in (a, x, state))
    h, final = _recurrence(
        settings,
        _planes(a),
        _planes(x),
        tuple(v[:, None] for v in _planes(state)),
        _marks(settings, x.shape[1], segment_ids),
    )
    return _joined(h), _joined(final)[:, 0]


def _marks(settings, time, segment_ids):
    """(b or 1, 1, blocks of steps): the mark of every step, and OUTSIDE for missing ones; None if all are 0."""
    missing = -time % settings.steps
    if segment_ids is None:
        if not missing:
            return ()
        segment_ids = jnp.ones((1, time), jnp.int32)
    direction = slice(None, None, -1) if settings.reverse else slice(None)
    start = segment_starts(segment_ids[:, direction])[:, direction]
    marks = jnp.where(segment_ids == 0, PADDING, jnp.where(start, START, 0.0))
    return (jnp.pad(marks, ((0, 0), (0, missing)), constant_values=OUTSIDE)[:, None],)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(settings, a, x, state, marks):
    """Planes of the outputs, in the type of x or float32 if x has fewer, and of the final state, (b, 1, d)."""
    blocks = _Blocks(settings, x[0].shape, backward=False)
    count = len(state)
    dtype = x[0].dtype if len(x) == count else jnp.float32
    outputs = blocks.call(
        _forward_kernel,
        [blocks.decays(a), blocks.steps(x), blocks.states(state), blocks.marks(marks)],
        [blocks.new_steps(count, dtype), blocks.new_states(count)],
        [blocks.carried(count), blocks.rows(marks)],
        "linear_recurrence",
    )
    return tuple(outputs[0]), tuple(outputs[1])


def _forward(settings, a, x, state, marks):
    h, final = _recurrence(settings, a, x, state, marks)
    # Of x, only its type and number of planes are needed.
    return (h, final), (a, tuple(v[:0] for v in x), state, marks, h)


def _backward(settings, residuals, cotangents):
    a, x, state, marks, h = residuals
    dh, dfinal = cotangents
    blocks = _Blocks(settings, h[0].shape, backward=True)
    count, invariant = len(state), a[0].shape[1] == 1
    shared = a[0].shape[0] != h[0].shape[0]
    da, dx, dstate = blocks.call(
        _backward_kernel,
        [
            blocks.decays(a),
            blocks.steps(h),
            blocks.states(state),
            blocks.marks(marks),
            blocks.steps(dh),
            blocks.states(dfinal),
            blocks.halos(h),
        ],
        [
            blocks.new_states(len(a))
            if invariant
            else blocks.new_steps(len(a), jnp.float32 if shared else a[0].dtype),
            blocks.new_steps(len(x), x[0].dtype),
            blocks.new_states(count),
        ],
        [blocks.carried(count), blocks.carried(len(a) if invariant else 0), blocks.rows(marks)],
        "linear_recurrence_backward",
    )
    if shared:
        da = [v.sum(0, keepdims=True) for v in da]
    return (
        tuple(v.astype(a[0].dtype) for v in da),
        tuple(dx),
        tuple(dstate),
        tuple(map(jnp.zeros_like, marks)),
    )


_recurrence.defvjp(_forward, _backward)


class _Blocks:
    """The grid (batch, channels, time) of a pass, and the blocks of its arrays."""

    def __init__(self, settings, shape, *, backward):
        self.settings, self.shape = settings, shape
        self.batch, self.time, self.width = shape
        self.count = pl.cdiv(self.time, settings.steps)
        self.descending = settings.reverse != backward

    def call(self, kernel, inputs, outputs, scratch, name):
        """Runs a kernel on groups of planes, which takes the references in the same groups."""
        return mosaic_tpu.call(
            functools.partial(kernel, self.settings),
            (self.batch, pl.cdiv(self.width, self.settings.lanes), self.count),
            2,
            inputs,
            outputs,
            scratch,
            self.settings.interpret,
            name,
        )

    def _spec(self, shape, rows, at):
        own = int(shape[0] != 1)
        return pl.BlockSpec(
            (None, rows, self.settings.lanes), lambda b, d, i: (own * b, at(self._place(i)), d)
        )

    def _place(self, i):
        return self.count - 1 - i if self.descending else i

    def steps(self, planes):
        """Arrays (b or 1, t, d)."""
        return [(v, self._spec(v.shape, self.settings.steps, lambda i: i)) for v in planes]

    def states(self, planes):
        """Arrays (b or 1, 1, d)."""
        return [(v, self._spec(v.shape, 1, lambda _: 0)) for v in planes]

    def decays(self, planes):
        """Arrays (b or 1, t or 1, d)."""
        return self.states(planes) if planes[0].shape[1] == 1 else self.steps(planes)

    def marks(self, marks):
        """Arrays (b or 1, 1, t), with time on the lanes."""
        block = None, 1, self.settings.steps
        own = [int(v.shape[0] != 1) for v in marks]
        return [
            (v, pl.BlockSpec(block, lambda b, _, i, own=own: (own * b, 0, self._place(i))))
            for v, own in zip(marks, own, strict=True)
        ]

    def halos(self, planes):
        """The steps of (b, t, d) next to a block, on the side where the recurrence comes from."""
        per_block = self.settings.steps // HALO
        last = pl.cdiv(self.time, HALO) - 1

        def at(i):
            if self.settings.reverse:
                return jnp.minimum((i + 1) * per_block, last)
            return jnp.maximum(i * per_block - 1, 0)

        return [(v, self._spec(v.shape, HALO, at)) for v in planes]

    def new_steps(self, count, dtype):
        return [(self.shape, dtype, self._spec(self.shape, self.settings.steps, lambda i: i))] * count

    def new_states(self, count):
        shape = self.batch, 1, self.width
        return [(shape, jnp.float32, self._spec((None, 1, self.width), 1, lambda _: 0))] * count

    def carried(self, count):
        return [pltpu.VMEM((1, self.settings.lanes), jnp.float32)] * count

    def rows(self, marks):
        return [pltpu.VMEM((self.settings.steps, mosaic_tpu.LANES), jnp.float32) for _ in marks]


def _forward_kernel(settings, a, x, state, marks, h, final, carried, rows):
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


def _backward_kernel(settings, a, h, state, marks, dh, dfinal, halo, da, dx, dstate, carried, sums, rows):
    first, last = pl.program_id(2) == 0, pl.program_id(2) == pl.num_programs(2) - 1
    _spread(rows, marks)

    @pl.when(first)
    def _():
        _copy(carried, dfinal)
        for ref in sums:
            ref[...] = jnp.zeros_like(ref)

    # The step before a block: of the block before, or the state that entered.
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
        target[...] = jnp.broadcast_to(mosaic_tpu.column(source[...]), target.shape)


def _group(settings, k, *, descending):
    count = settings.steps // settings.group
    start = (count - 1 - k if descending else k) * settings.group
    return pl.ds(pl.multiple_of(start, settings.group), settings.group)


def _tiles(refs, at):
    """Steps `at` as (tiles, 8, lanes) in float32; one step stands for all."""
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
    """Decay 0 where a segment starts and 1 on padding."""
    marked = tuple(jnp.where(mark != 0, 0, v) for v in decay[1:])
    return (jnp.where(mark == START, 0, jnp.where(_skipped(mark), 1, decay[0])), *marked)


def _states(decay, inputs, carry, descending):
    """The recurrence over tiles (n, 8, d).

    Returns the states after every step, those that enter every tile, (n, 1, d), and the one that leaves.
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
    """Product of numbers of one (real) or two planes."""
    if len(a) == 1 or len(b) == 1:
        (factor,), planes = (a, b) if len(a) == 1 else (b, a)
        return tuple(factor * v for v in planes)
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def _conjugate(a):
    return (a[0], *(-v for v in a[1:]))


def _planes(v):
    return (v.real, v.imag) if jnp.iscomplexobj(v) else (v,)


def _joined(planes):
    return planes[0] if len(planes) == 1 else jax.lax.complex(*planes)
