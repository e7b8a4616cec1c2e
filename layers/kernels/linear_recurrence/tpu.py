"""`linear_recurrence` as Pallas kernels for TPUs: one pass over memory forward and one backward.

The kernels are checked in the interpreter and compiled for a v5e; they have not run on a TPU.

The grid is batch, blocks of channels (lanes) and blocks of time, the last in order: the state stays in VMEM. Complex
numbers are two real planes. Inside a block, 8 steps (the sublanes of a register) are combined by doubling, with three
rotations, and the state then passes from one such tile to the next. The backward pass runs the other way. With u_t the
gradient that step t passes to the state before it,

    g_t = dh_t + u_{t+1},    u_t = conj(a_t) g_t,    dx_t = g_t,    da_t = g_t conj(h_{t-1}),

needs a, the output h and, at the border of a block, 16 steps of h of the block before.

Bytes: a, x and h once forward; a, h, dh, dx and da once backward. At 8 x 4096 x 2048 float32 that is 0.8 and 1.3 GB, or
1.0 and 1.6 ms on a v5e. The arithmetic (real) needs 2 operations per element and does some 20, of which a third are
rotations and masks; memory should bound both passes. Segments or an odd length add a mask, one float per step, which every
block of channels reads and turns from lanes to sublanes.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from layers.kernels import mosaic_tpu, partition
from layers.kernels.checks import accumulation_dtype
from layers.kernels.linear_recurrence import tpu_kernels
from layers.kernels.linear_recurrence.tpu_kernels import HALO, OUTSIDE, PADDING, START
from layers.kernels.promotion import promoting
from layers.kernels.segments import reset_mask, select_real
from layers.kernels.shard_map_types import vary_as

# Steps per block of time and channels per block of lanes (half of these if complex): 0.5 MB per array, double-buffered.
STEPS, CHANNELS = 256, 512
# Steps whose tiles of 8 are combined at once, enough to hide the latency of rotations; a multiple of HALO.
GROUP = 64


class Settings(NamedTuple):
    """Direction, steps and lanes per block, steps per group, and the interpreter if any."""

    reverse: bool
    steps: int
    lanes: int
    group: int
    interpret: Any


def unsupported_reason(a, x, initial_state, **_):
    """Why the kernels cannot take a call, or None."""
    return mosaic_tpu.unavailable(a, x, initial_state)


def passed_over_reason(x, **_):
    """Why `impl=None` does not take the kernels, or None. Calls that do not fill blocks are left to XLA."""
    if reason := mosaic_tpu.passed_over_reason(x):
        return reason
    if x.shape[1] < STEPS or x.shape[2] < mosaic_tpu.LANES:
        return f"x has {x.shape[1]} steps of {x.shape[2]} channels; a block has {STEPS} of {mosaic_tpu.LANES}"
    return None


def linear_recurrence(a, x, initial_state, segments, reverse):
    """Returns every state and the last; the public function has checked the arguments."""
    dtype = accumulation_dtype(a, x, initial_state)
    shape = x.shape[0], x.shape[2]
    state = jnp.zeros(shape, dtype) if initial_state is None else initial_state.astype(dtype)
    rows, _, across = partition.spec_of(x, heads=2)
    whole, edge = P(rows, None, across), P(rows, across)
    a_spec = P(rows if a.shape[0] > 1 else None, None, across)
    arrays, specs = (a, x, state, segments), (a_spec, whole, edge, P(rows, None))
    return partition.over_shards(functools.partial(_local, reverse), arrays, specs, (whole, edge))


def _local(reverse, a, x, state, segments):
    """The recurrence on one device."""
    dtype, (_, time, width) = state.dtype, x.shape
    channels = CHANNELS // 2 if jnp.issubdtype(dtype, jnp.complexfloating) else CHANNELS
    settings = Settings(
        reverse,
        min(STEPS, mosaic_tpu.up(time, max(GROUP, mosaic_tpu.LANES))),
        min(channels, mosaic_tpu.up(width, mosaic_tpu.LANES)) if width > mosaic_tpu.LANES else width,
        GROUP,
        mosaic_tpu.INTERPRET,
    )
    return _run(settings, a, x, state, segments)


@functools.partial(jax.jit, static_argnums=0)
def _run(settings, a, x, state, segments):
    # The kernels multiply what stands at padding by zero, which leaves NaN where it is not finite.
    x, a = select_real(x, segments), select_real(a, segments) if a.shape == x.shape else a
    a, x, state = (vary_as(v, a, x, state) for v in (a, x, state))
    h, final = _recurrence(
        settings,
        _planes(a),
        _planes(x),
        tuple(v[:, None] for v in _planes(state)),
        _marks(settings, x.shape[1], segments),
    )
    return _joined(h), _joined(final)[:, 0]


def _marks(settings, time, segments):
    """(b or 1, 1, blocks of steps): the mark per step, and OUTSIDE for missing steps; None if all are 0."""
    missing = -time % settings.steps
    if segments is None:
        if not missing:
            return ()
        marks = jnp.zeros((1, time), jnp.float32)
    else:
        start = reset_mask(segments, settings.reverse)
        inside = 0.0 if start is None else jnp.where(start, START, 0.0)
        marks = jnp.where(segments.real, inside, PADDING).astype(jnp.float32)
    return (jnp.pad(marks, ((0, 0), (0, missing)), constant_values=OUTSIDE)[:, None],)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(settings, a, x, state, marks):
    """Planes of the outputs, in the type of x or float32 if x has fewer planes, and of the final state, (b, 1, d)."""
    blocks = _Blocks(settings, x[0].shape, backward=False)
    count = len(state)
    dtype = x[0].dtype if len(x) == count else jnp.float32
    outputs = blocks.call(
        tpu_kernels.forward,
        [blocks.decays(a), blocks.steps(x), blocks.states(state), blocks.marks(marks)],
        [blocks.new_steps(count, dtype), blocks.new_states(count)],
        [blocks.carried(count), blocks.rows(marks)],
        "linear_recurrence",
    )
    return tuple(outputs[0]), tuple(outputs[1])


def _forward(settings, a, x, state, marks):
    h, final = _recurrence(settings, a, x, state, marks)
    # Only the type and the number of planes of x are needed.
    return (h, final), (a, tuple(v[:0] for v in x), state, marks, h)


def _backward(settings, residuals, cotangents):
    a, x, state, marks, h = residuals
    dh, dfinal = cotangents
    blocks = _Blocks(settings, h[0].shape, backward=True)
    count, invariant = len(state), a[0].shape[1] == 1
    shared = a[0].shape[0] != h[0].shape[0]
    da, dx, dstate = blocks.call(
        tpu_kernels.backward,
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


_recurrence.defvjp(promoting(_forward), promoting(_backward))


class _Blocks:
    """The grid (batch, channels, time) of a pass, and the blocks of its arrays."""

    def __init__(self, settings, shape, *, backward):
        self.settings, self.shape = settings, shape
        self.batch, self.time, self.width = shape
        self.count = pl.cdiv(self.time, settings.steps)
        self.descending = settings.reverse != backward

    def call(self, kernel, inputs, outputs, scratch, name):
        """Runs a kernel on groups of planes; it takes the references in the same groups."""
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
        """The steps of (b, t, d) next to a block, on the side from which the recurrence comes."""
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


def _planes(v):
    return (v.real, v.imag) if jnp.iscomplexobj(v) else (v,)


def _joined(planes):
    return planes[0] if len(planes) == 1 else jax.lax.complex(*planes)
