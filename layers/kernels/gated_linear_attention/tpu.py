"""`gated_linear_attention` as Pallas kernels for TPUs, with at most one decay per head and step.

The kernels are checked in the interpreter and compiled for a v5e; they have not run on a TPU.

There is one kernel forward and one backward, with chunks as in `chunked`. The grid is batch, groups of heads that share
queries and keys, blocks of a few chunks in order, and parts of a group's heads. The states of all heads of the group stay in
VMEM from block to block. In memory heads come before time, and the values of a group's heads lie side by side. The forward
pass of a gradient stores the state at the start of every block. From it the backward pass recomputes the states of the
block's chunks, while it carries the gradient of the state from the last block to the first.

Sums of log-decay between two steps are products with a triangle of ones, without differences, so a decay of -20 costs its
neighbours no accuracy.

At 8 x 4096 tokens, 16 heads of 128 in bfloat16, the kernels move 0.54 GB forward and 1.0 GB backward with the stored states:
0.66 and 1.25 ms on a v5e. With scalar decay, each chunk and head takes 6 products of 128 x 128 matrices forward, 2 of them
for sums of log-decay, and 14 backward: 0.10 and 0.23 TFLOP in all, or 0.5 and 1.2 ms at the peak of the matrix units. The
exponentials, masks and roundings of scores, and the registers that they spill, bound the backward pass. Moving heads before
time costs a pass over an array unless its producer absorbs the move.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from layers.kernels import mosaic_tpu, partition
from layers.kernels.gated_linear_attention import tpu_kernels
from layers.kernels.mixed_precision import operand_dtype
from layers.kernels.promotion import promoting
from layers.kernels.segments import select_real
from layers.kernels.shard_map_types import vary_as
from layers.kernels.tpu_chunks import segment_numbers

# Steps per chunk, the size of matrix units, and chunks per block (half as many in float32). Larger blocks make fewer, longer
# steps of the grid.
CHUNK, CHUNKS = 128, 4
# What fits into 16 MB of VMEM beside everything else in the backward pass: the values of the heads that a step of the grid
# takes, keys times these, keys times the values of all heads of a group plus twice these (fewer in float32).
WIDEST, LARGEST_STATE = 512, 1 << 17
LARGEST_STATES, LARGEST_STATES_FLOAT32 = 9 << 17, 6 << 17


class Settings(NamedTuple):
    """The static settings of a kernel.

    Attributes:
      scale: factor of the outputs.
      chunk, chunks: steps per chunk, chunks per block.
      groups, group: groups of heads that share queries and keys, and heads per group.
      heads: heads of a group that one step of the grid takes.
      keys, width: features of a key and of a value, with padding.
      dtype: type of the operands of products.
      interpret: see `mosaic_tpu`.
    """

    scale: float
    chunk: int
    chunks: int
    groups: int
    group: int
    heads: int
    keys: int
    width: int
    dtype: Any
    interpret: Any


def unsupported_reason(q, k, v, log_decay, bonus, normalize, initial_state, **_):
    """Why the kernels cannot take a call, or None."""
    if normalize:
        return "normalize=True is not implemented; use impl='xla'"
    if bonus is not None:
        return "a bonus is not implemented; use impl='xla'"
    if log_decay is not None and log_decay.ndim == 4:
        return "a decay per key channel is not implemented; use impl='xla'"
    _, heads, width = _heads(q, k, v, log_decay)
    keys, values = mosaic_tpu.up(k.shape[3], mosaic_tpu.LANES), _part(heads, width) * width
    narrow = operand_dtype(q, k, v) == jnp.bfloat16
    if (
        keys * values > LARGEST_STATE
        or keys * (heads * width + 2 * values) > (LARGEST_STATES if narrow else LARGEST_STATES_FLOAT32)
        or values > WIDEST
    ):
        return f"{heads} heads that share queries and keys, {keys} by {width}, do not fit into VMEM; use impl='xla'"
    return mosaic_tpu.unavailable(q, k, v, log_decay, initial_state)


def passed_over_reason(q, k, v, **_):
    """Why `impl=None` does not take the kernels, or None. Calls that fill no chunk are left to XLA."""
    if reason := mosaic_tpu.passed_over_reason(q):
        return reason
    if (dtype := operand_dtype(q, k, v)) != jnp.bfloat16:
        return f"products are in {dtype}; the kernels are for bfloat16"
    if q.shape[1] < CHUNK or k.shape[3] < 64 or v.shape[3] < 64:
        return f"q has {q.shape[1]} tokens and v {v.shape[3]} features; expected at least {CHUNK} and 64"
    return None


def gated_linear_attention(q, k, v, log_decay, bonus, scale, normalize, initial_state, segments, smallest):
    """Returns outputs and the final state; the public function and `unsupported_reason` have checked the arguments."""
    del bonus, normalize, smallest
    own = 1 if log_decay is None else log_decay.shape[0 if log_decay.ndim == 1 else 2]
    heads = max(*(x.shape[2] for x in (q, k, v)), own)
    rows, _, split, _ = partition.spec_of(v, heads=2)
    if v.shape[2] != heads or any(x.shape[2] not in (1, heads) for x in (q, k)):
        split = None

    def across(count):
        return split if count == heads else None

    decay_spec = None
    if log_decay is not None and log_decay.ndim == 1:
        decay_spec = P(across(own))
    elif log_decay is not None:
        decay_spec = P(rows if log_decay.shape[0] > 1 else None, None, across(own))
    specs = *(P(rows, None, across(x.shape[2]), None) for x in (q, k, v)), decay_spec
    state = P(rows, split, None, None)
    return partition.over_shards(
        functools.partial(_local, scale),
        (q, k, v, log_decay, initial_state, segments),
        (*specs, state, P(rows, None)),
        (P(rows, None, split, None), state),
    )


def _local(scale, q, k, v, log_decay, initial_state, segments):
    """The call on one device."""
    groups, heads, width = _heads(q, k, v, log_decay)
    dtype = operand_dtype(q, k, v)
    count = pl.cdiv(q.shape[1], CHUNK)
    most = CHUNKS if dtype == jnp.bfloat16 else CHUNKS // 2
    settings = Settings(
        scale=scale,
        chunk=CHUNK,
        chunks=pl.cdiv(count, pl.cdiv(count, most)),
        groups=groups,
        group=heads,
        heads=_part(heads, width),
        keys=mosaic_tpu.up(k.shape[3], mosaic_tpu.LANES),
        width=width,
        dtype=dtype,
        interpret=mosaic_tpu.INTERPRET,
    )
    return _run(settings, q, k, v, log_decay, initial_state, segments)


def _heads(q, k, v, log_decay):
    """Returns the groups of heads that share queries and keys, the heads per group, and the padded features per value.

    Values narrower than a register lie side by side if those of a group fill registers.
    """
    own = 1 if log_decay is None else log_decay.shape[0 if log_decay.ndim == 1 else 2]
    heads = max(*(x.shape[2] for x in (q, k, v)), own)
    groups, width = math.lcm(q.shape[2], k.shape[2]), v.shape[3]
    heads //= groups
    if mosaic_tpu.LANES % width or heads * width % mosaic_tpu.LANES:
        width = mosaic_tpu.up(width, mosaic_tpu.LANES)
    return groups, heads, width


def _part(heads, width):
    """The number of heads of a group that a step of the grid takes: as many as registers and VMEM admit."""
    fits = (n for n in range(8, heads, 8) if heads % n == 0 and n * width % mosaic_tpu.LANES == 0)
    return next(fits, heads)


@functools.partial(jax.jit, static_argnums=0)
def _run(settings, q, k, v, log_decay, initial_state, segments):
    """Runs the kernels on arrays in their layout, with time cut into chunks n.

    q, k: (b, groups, n c, k); v: (b, groups, n c, heads v); log-decay: (b or 1, groups, n, heads, c);
    states: (b, groups, k, heads v).
    """
    batch, time, _, values = v.shape
    groups, heads, keys, width = settings.groups, settings.group, settings.keys, settings.width
    missing = -time % (settings.chunk * settings.chunks)
    q, k, v = (select_real(x, segments) for x in (q, k, v))

    def by_group(x, count, width):
        x = jnp.repeat(x.astype(settings.dtype), count // x.shape[2], axis=2)
        x = jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, width - x.shape[3])))
        return x.reshape(batch, time + missing, groups, -1).swapaxes(1, 2)

    log_decays = ()
    if log_decay is not None:
        g = (log_decay[None, None] if log_decay.ndim == 1 else log_decay).astype(jnp.float32)
        # Clamp: exp underflows below this, and -inf would give 0 x inf = NaN.
        g = jnp.maximum(g, 2 * math.log(jnp.finfo(jnp.float32).tiny))
        g = jnp.broadcast_to(g, (g.shape[0], time, g.shape[2]))
        if segments is not None:
            g = select_real(jnp.broadcast_to(g, (batch, *g.shape[1:])), segments)
        g = jnp.pad(g, ((0, 0), (0, missing), (0, 0)))
        g = g.reshape(g.shape[0], -1, settings.chunk, groups, heads)
        log_decays = (g.transpose(0, 3, 1, 4, 2),)
    state = jnp.zeros((batch, groups, keys, heads * width), jnp.float32)
    if initial_state is not None:
        fill = (0, keys - k.shape[3]), (0, width - values)
        state = jnp.pad(initial_state.astype(jnp.float32), ((0, 0), (0, 0), *fill))
        state = (
            state.reshape(batch, groups, heads, keys, width).swapaxes(2, 3).reshape(batch, groups, keys, -1)
        )
    moving = by_group(q, groups, keys), by_group(k, groups, keys), by_group(v, groups * heads, width)
    moving = *moving, log_decays, state
    *moving, state = jax.tree.map(lambda x: vary_as(x, *jax.tree.leaves(moving)), moving)
    o, final = _attend(settings, *moving, segment_numbers(settings, segments, missing), state)
    o = o.swapaxes(1, 2).reshape(batch, -1, groups * heads, width)
    final = final.reshape(batch, groups, keys, heads, width).swapaxes(2, 3).reshape(batch, -1, keys, width)
    return o[:, :time, :, :values], final[:, :, : k.shape[3], :values]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(settings, q, k, v, g, numbers, state):
    """Returns outputs, in the type of v, and the final state, in the layout of `_run`."""
    return _forward_pass(settings, q, k, v, g, numbers, state, store=False)[:2]


def _forward_pass(settings, q, k, v, g, numbers, state, *, store):
    blocks = _Blocks(settings, q, descending=False)
    stored = (*state.shape[:2], blocks.count, *state.shape[2:])
    (o,), (final,), entering = blocks.call(
        tpu_kernels.forward,
        [*blocks.inputs(q, k, v, g, numbers), [(state, blocks.state(first=True))]],
        [
            [(v.shape, v.dtype, blocks.values())],
            [(state.shape, jnp.float32, blocks.state(first=False))],
            [(stored, jnp.float32, blocks.entering())] * store,
        ],
        [[blocks.carried()]],
        "gated_linear_attention",
    )
    return o, final, *entering


def _forward(settings, q, k, v, g, numbers, state):
    o, final, entering = _forward_pass(settings, q, k, v, g, numbers, state, store=True)
    return (o, final), (q, k, v, g, numbers, entering)


def _backward(settings, residuals, cotangents):
    q, k, v, g, numbers, entering = residuals
    do, dfinal = cotangents
    blocks = _Blocks(settings, q, descending=True)
    batch = q.shape[0]
    (dq, dk), (dv,), dg, (dstate,) = blocks.call(
        tpu_kernels.backward,
        [
            *blocks.inputs(q, k, v, g, numbers),
            [(entering, blocks.entering())],
            [(do, blocks.values())],
            [(dfinal, blocks.state(first=True))],
        ],
        [
            [(x.shape, x.dtype, blocks.shared()) for x in (q, k)],
            [(v.shape, v.dtype, blocks.values())],
            [((batch, *x.shape[1:]), jnp.float32, blocks.decays(batch)) for x in g],
            [(dfinal.shape, jnp.float32, blocks.state(first=False))],
        ],
        [
            [blocks.carried()],
            [pltpu.VMEM((settings.chunks, settings.keys, blocks.lanes), jnp.float32)],
            [pltpu.VMEM((blocks.steps, settings.keys), jnp.float32)] * 2,
        ],
        "gated_linear_attention_backward",
    )
    if g and g[0].shape[0] == 1:
        dg = [x.sum(0, keepdims=True) for x in dg]
    return dq, dk, dv, tuple(dg), tuple(map(jnp.zeros_like, numbers)), dstate


_attend.defvjp(promoting(_forward), promoting(_backward))


class _Blocks:
    """The grid (batch, groups, blocks of time, parts of a group) of a pass, and the blocks of its arrays."""

    def __init__(self, settings, q, *, descending):
        self.settings = settings
        self.steps = settings.chunk * settings.chunks
        self.lanes = settings.heads * settings.width
        self.count, self.parts = q.shape[2] // self.steps, settings.group // settings.heads
        self.grid = q.shape[0], settings.groups, self.count, self.parts
        self.place = (lambda i: self.count - 1 - i) if descending else (lambda i: i)

    def call(self, kernel, inputs, outputs, scratch, name):
        """Runs a kernel on groups of arrays, with the parts and blocks of time in order."""
        run = functools.partial(kernel, self.settings)
        return mosaic_tpu.call(run, self.grid, 2, inputs, outputs, scratch, self.settings.interpret, name)

    def shared(self):
        """Queries and keys."""
        block = None, None, self.steps, self.settings.keys
        return pl.BlockSpec(block, lambda b, g, i, _: (b, g, self.place(i), 0))

    def values(self):
        block = None, None, self.steps, self.lanes
        return pl.BlockSpec(block, lambda b, g, i, j: (b, g, self.place(i), j))

    def decays(self, batch):
        block, own = (
            (None, None, self.settings.chunks, self.settings.heads, self.settings.chunk),
            int(batch != 1),
        )
        return pl.BlockSpec(block, lambda b, g, i, j: (own * b, g, self.place(i), j, 0))

    def inputs(self, q, k, v, g, numbers):
        block = None, self.settings.chunks, 2, self.settings.chunk
        spec = pl.BlockSpec(block, lambda b, _, i, __: (b, self.place(i), 0, 0))
        return [
            [(q, self.shared())],
            [(k, self.shared())],
            [(v, self.values())],
            [(x, self.decays(x.shape[0])) for x in g],
            [(x, spec) for x in numbers],
        ]

    def state(self, *, first):
        """A state that is read in the first block, or written in the last; its block does not move between."""
        block = None, None, self.settings.keys, self.lanes

        def at(b, g, i, j):
            here = jnp.where(i == 0, j, self.parts - 1) if first else jnp.where(i == self.count - 1, j, 0)
            return b, g, 0, here

        return pl.BlockSpec(block, at)

    def entering(self):
        """The states that enter the blocks, (b, groups, blocks, k, heads v)."""
        block = None, None, None, self.settings.keys, self.lanes
        return pl.BlockSpec(block, lambda b, g, i, j: (b, g, self.place(i), 0, j))

    def carried(self):
        return pltpu.VMEM((self.parts, self.settings.keys, self.lanes), jnp.float32)
