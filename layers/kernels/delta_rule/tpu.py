"""`delta_rule` as Pallas kernels for TPUs, with no decay or one per head and step.

The kernels are checked in the interpreter and compiled for a v5e; they have not run on a TPU.

There is one kernel forward and one backward; tpu_kernels.py has their equations. The grid is batch, heads and blocks of a few
chunks in order: the state of a head stays in VMEM from block to block. Arrays stay in their layout, with the features of all
heads side by side, and a block takes those of its head. The triangular system of a chunk is inverted by matrix products, which
do not need the state, so that those of one chunk overlap with the walk of another. The forward pass of a gradient stores the
inverses, and the state at the start of every block. From them the backward pass recomputes the states of the block's chunks,
while it carries the gradient of the state from the last block to the first.

Sums of log-decay between two steps are products with a triangle of ones, without differences, so a decay of -20 costs its
neighbours no accuracy.

At 8 x 4096 tokens, 16 heads of 128 in bfloat16, the kernels move 0.54 GB forward, 0.2 GB more for a gradient, and 1.1 GB
backward: 0.66, 0.25 and 1.4 ms on a v5e. A chunk of 128 steps and a head takes 24 products of 128 x 128 matrices forward, 15 of
them for the inverse, and 24 backward: 0.4 TFLOP each, or 2.1 ms at the peak of the matrix units, which bound both passes.
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
from layers.kernels.delta_rule import tpu_kernels
from layers.kernels.delta_rule.unit_norm import normalized
from layers.kernels.mixed_precision import operand_dtype
from layers.kernels.promotion import promoting
from layers.kernels.segments import select_real
from layers.kernels.shard_map_types import vary_as
from layers.kernels.tpu_chunks import segment_numbers

# Steps per chunk, the size of matrix units and a power of two, and chunks per block (half as many in float32).
CHUNK, CHUNKS = 128, 4
# The bytes of VMEM that the blocks and the memory of a kernel may take, of 16 MiB; the compiler needs the rest.
MOST_BYTES = 12 << 20


class Settings(NamedTuple):
    """The static settings of a kernel.

    Attributes:
      scale: factor of the queries.
      chunk, chunks: steps per chunk, chunks per block.
      heads, group: heads of values, and those that share queries and keys.
      keys, values: features of a key and of a value, with padding.
      dtype: type of the operands of products.
      interpret: see `mosaic_tpu`.
    """

    scale: float
    chunk: int
    chunks: int
    heads: int
    group: int
    keys: int
    values: int
    dtype: Any
    interpret: Any

    @property
    def steps(self) -> int:
        """Steps per block."""
        return self.chunk * self.chunks


def unsupported_reason(q, k, v, beta, log_decay, initial_state, **_: Any) -> str | None:
    """Why the kernels cannot take a call, or None."""
    if log_decay is not None and log_decay.ndim == 4:
        return "a decay per key channel is not implemented; use impl='xla'"
    if jax.typeof(v).sharding.spec[1] is not None:
        return f"v is sharded {jax.typeof(v).sharding.spec}; expected whole rows, time not sharded"
    if _bytes(_settings(1.0, q, k, v)) > MOST_BYTES:
        return f"heads of {k.shape[3]} by {v.shape[3]} do not fit into VMEM; use impl='xla'"
    return mosaic_tpu.unavailable(q, k, v, beta, log_decay, initial_state)


def passed_over_reason(q, k, v, **_: Any) -> str | None:
    """Why `impl=None` does not take the kernels, or None. Calls that fill no chunk are left to XLA."""
    if reason := mosaic_tpu.passed_over_reason(v):
        return reason
    if (dtype := operand_dtype(q, k, v)) != jnp.bfloat16:
        return f"products are in {dtype}; the kernels are for bfloat16"
    if v.shape[1] < CHUNK or k.shape[3] < 64 or v.shape[3] < 64:
        return f"v has {v.shape[1]} tokens and heads are {k.shape[3]} by {v.shape[3]}; expected at least {CHUNK} and 64 by 64"
    return None


def delta_rule(q, k, v, beta, log_decay, scale, normalize_qk, initial_state, segments):
    """Returns outputs and the final state; the public function and `unsupported_reason` have checked the arguments."""
    rows, _, across, _ = partition.spec_of(v, heads=2)
    if k.shape[2] != v.shape[2] and k.shape[2] % partition.parts(across):
        across = None
    wide, vector, state = P(rows, None, across, None), P(rows, None, across), P(rows, across, None, None)
    return partition.over_shards(
        functools.partial(_local, scale, normalize_qk),
        (q, k, v, beta, log_decay, initial_state, segments),
        (wide, wide, wide, vector, vector, state, P(rows, None)),
        (wide, state),
    )


def _settings(scale, q, k, v):
    dtype = operand_dtype(q, k, v)
    count = pl.cdiv(v.shape[1], CHUNK)
    most = CHUNKS if dtype == jnp.bfloat16 else max(CHUNKS // 2, 1)
    return Settings(
        scale=scale,
        chunk=CHUNK,
        chunks=pl.cdiv(count, pl.cdiv(count, most)),
        heads=v.shape[2],
        group=v.shape[2] // k.shape[2],
        keys=mosaic_tpu.up(k.shape[3], mosaic_tpu.LANES),
        values=mosaic_tpu.up(v.shape[3], mosaic_tpu.LANES),
        dtype=dtype,
        interpret=mosaic_tpu.INTERPRET,
    )


def _bytes(settings):
    """What the backward pass holds in VMEM: double-buffered blocks, states and what is computed again."""
    size, keys, values = jnp.dtype(settings.dtype).itemsize, settings.keys, settings.values
    shared = 4 if settings.group > 1 else size
    blocks = size * (2 * keys + 3 * values + settings.chunk) + shared * 2 * keys
    return settings.steps * (2 * blocks + (size + 4) * values) + 4 * keys * values * (7 + settings.chunks)


def _local(scale, normalize_qk, q, k, v, beta, log_decay, initial_state, segments):
    """The call on one device."""
    return _run(_settings(scale, q, k, v), normalize_qk, q, k, v, beta, log_decay, initial_state, segments)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(settings, normalize_qk, q, k, v, beta, log_decay, initial_state, segments):
    """Runs the kernels on arrays in their layout, with time padded to whole blocks.

    q, k, v: (b, t, heads features); beta and log-decay: (b, h, n, 1 or 2, c) for chunks n of c steps; states: (b, h, k, v).
    """
    batch, time, _, values = v.shape
    keys, missing = k.shape[3], -time % settings.steps
    q, k, v = (select_real(x, segments) for x in (q, k, v))
    if normalize_qk:
        q, k = normalized(q), normalized(k)

    def joined(x, width):
        x = jnp.pad(x.astype(settings.dtype), ((0, 0), (0, missing), (0, 0), (0, width - x.shape[3])))
        return x.reshape(batch, time + missing, -1)

    vectors = [beta.astype(jnp.float32)]
    if log_decay is not None:
        # Clamp: exp underflows below this, and -inf would give 0 x inf = NaN.
        vectors.append(jnp.maximum(log_decay.astype(jnp.float32), 2 * math.log(jnp.finfo(jnp.float32).tiny)))
    vectors = select_real(jnp.stack(vectors, axis=3), segments)
    vectors = jnp.pad(vectors, ((0, 0), (0, missing), (0, 0), (0, 0)))
    vectors = vectors.reshape(batch, -1, settings.chunk, *vectors.shape[2:]).transpose(0, 3, 1, 4, 2)
    state = jnp.zeros((batch, settings.heads, settings.keys, settings.values), jnp.float32)
    if initial_state is not None:
        fill = (0, settings.keys - keys), (0, settings.values - values)
        state = jnp.pad(initial_state.astype(jnp.float32), ((0, 0), (0, 0), *fill))
    moving = joined(q, settings.keys), joined(k, settings.keys), joined(v, settings.values), vectors, state
    *moving, state = (vary_as(x, *moving) for x in moving)
    o, final = _rule(settings, *moving, segment_numbers(settings, segments, missing), state)
    o = o.reshape(batch, -1, settings.heads, settings.values)
    return o[:, :time, :, :values], final[:, :, :keys, :values]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rule(settings, q, k, v, vectors, numbers, state):
    """Returns outputs, in the type of v, and the final state, in the layout of `_run`."""
    return _forward_pass(settings, q, k, v, vectors, numbers, state, store=False)[:2]


def _forward_pass(settings, q, k, v, vectors, numbers, state, *, store):
    blocks = _Blocks(settings, v, descending=False)
    batch, time, _ = v.shape
    kept = [
        ((*state.shape[:2], blocks.count, *state.shape[2:]), jnp.float32, blocks.entering()),
        ((batch, time, settings.heads * settings.chunk), settings.dtype, blocks.features(settings.chunk)),
    ]
    (o,), (final,), kept = blocks.call(
        tpu_kernels.forward,
        [*blocks.inputs(q, k, v, vectors, numbers), [(state, blocks.state())]],
        [
            [(v.shape, v.dtype, blocks.features(settings.values))],
            [(state.shape, jnp.float32, blocks.state())],
            kept * store,
        ],
        [[blocks.carried()]],
        "delta_rule",
    )
    return o, final, *kept


def _forward(settings, q, k, v, vectors, numbers, state):
    o, final, entering, inverses = _forward_pass(settings, q, k, v, vectors, numbers, state, store=True)
    return (o, final), (q, k, v, vectors, numbers, entering, inverses)


def _backward(settings, residuals, cotangents):
    q, k, v, vectors, numbers, entering, inverses = residuals
    do, dfinal = cotangents
    blocks = _Blocks(settings, v, descending=True)
    batch, time, _ = v.shape
    shape = batch, time, settings.heads * settings.keys
    shared = jnp.float32 if settings.group > 1 else q.dtype
    values = blocks.features(settings.values)
    (dq, dk), (dv,), (dvectors,), (dstate,) = blocks.call(
        tpu_kernels.backward,
        [
            *blocks.inputs(q, k, v, vectors, numbers),
            [(entering, blocks.entering())],
            [(inverses, blocks.features(settings.chunk))],
            [(do, values)],
            [(dfinal, blocks.state())],
        ],
        [
            [(shape, shared, blocks.features(settings.keys))] * 2,
            [(v.shape, v.dtype, values)],
            [(vectors.shape, jnp.float32, blocks.vectors(vectors.shape[3]))],
            [(dfinal.shape, jnp.float32, blocks.state())],
        ],
        [
            [blocks.carried()],
            [pltpu.VMEM((settings.chunks, settings.keys, settings.values), jnp.float32)],
            [pltpu.VMEM((settings.steps, settings.values), jnp.float32)],
            [pltpu.VMEM((settings.steps, settings.values), settings.dtype)],
        ],
        "delta_rule_backward",
    )
    if settings.group > 1:
        dq, dk = (
            x.reshape(batch, time, -1, settings.group, settings.keys).sum(3).reshape(q.shape).astype(q.dtype)
            for x in (dq, dk)
        )
    return dq, dk, dv, dvectors, tuple(map(jnp.zeros_like, numbers)), dstate


_rule.defvjp(promoting(_forward), promoting(_backward))


class _Blocks:
    """The grid (batch, heads, blocks of time) of a pass, and the blocks of its arrays."""

    def __init__(self, settings, v, *, descending):
        self.settings = settings
        self.count = v.shape[1] // settings.steps
        self.grid = v.shape[0], settings.heads, self.count
        self.place = (lambda i: self.count - 1 - i) if descending else (lambda i: i)

    def call(self, kernel, inputs, outputs, scratch, name):
        run = functools.partial(kernel, self.settings)
        return mosaic_tpu.call(run, self.grid, 2, inputs, outputs, scratch, self.settings.interpret, name)

    def features(self, width, group=1):
        """Arrays (b, t, heads width), with `group` heads of values for each."""
        block = None, self.settings.steps, width
        return pl.BlockSpec(block, lambda b, h, i: (b, self.place(i), jax.lax.div(h, jnp.int32(group))))

    def vectors(self, count):
        block = None, None, self.settings.chunks, count, self.settings.chunk
        return pl.BlockSpec(block, lambda b, h, i: (b, h, self.place(i), 0, 0))

    def inputs(self, q, k, v, vectors, numbers):
        block = None, self.settings.chunks, 2, self.settings.chunk
        spec = pl.BlockSpec(block, lambda b, _, i: (b, self.place(i), 0, 0))
        shared = self.features(self.settings.keys, self.settings.group)
        return [
            [(q, shared)],
            [(k, shared)],
            [(v, self.features(self.settings.values))],
            [(vectors, self.vectors(vectors.shape[3]))],
            [(x, spec) for x in numbers],
        ]

    def state(self):
        """Arrays (b, h, k, v), whose block does not move with time."""
        block = None, None, self.settings.keys, self.settings.values
        return pl.BlockSpec(block, lambda b, h, _: (b, h, 0, 0))

    def entering(self):
        """The states that enter the blocks, (b, h, blocks, k, v)."""
        block = None, None, None, self.settings.keys, self.settings.values
        return pl.BlockSpec(block, lambda b, h, i: (b, h, self.place(i), 0, 0))

    def carried(self):
        return pltpu.VMEM((self.settings.keys, self.settings.values), jnp.float32)
