"""`short_conv` as Pallas kernels for TPUs: one pass over memory forward and one backward, with bias and SiLU inside.

The kernels are checked in the interpreter and compiled for a v5e; they have not run on a TPU.

The grid is batch, blocks of channels (lanes) and blocks of time, the last in order: the inputs that the taps of the next block
reach back to stay in VMEM. The backward pass runs the other way. With p what enters the activation,

    dp_t = dy_t activation'(p_t),   dx_s = sum_k weight_{w-1-k} dp_{s+k},   dweight_{w-1-k} = sum_t dp_t x_{t-k},

it computes p again from x and the 16 steps before the block, and carries the dp of the first steps of the block behind it.
Segments are two small numbers per token, how many tokens before and behind it share its segment; a tap that reaches further is
left out. Padding may only end the rows.

Bytes: x and y once forward; x, dy and dx once backward, and 3% of x a second time. At 8 x 4096 x 4096 bfloat16 that is 0.54 and
0.82 GB, or 0.66 and 1.0 ms on a v5e.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from layers.kernels import mosaic_tpu, partition
from layers.kernels.promotion import promoting
from layers.kernels.shard_map_types import vary_as
from layers.kernels.short_conv import tpu_kernels
from layers.kernels.short_conv.edges import final_state, token_codes
from layers.kernels.short_conv.tpu_kernels import BEFORE, EDGE

# Steps per block of time and channels per block of lanes: 0.5 MB per array of bfloat16, double-buffered.
STEPS, CHANNELS = 512, 512
# Steps that are computed at once, so that what they need stays in registers; STEPS is a multiple.
GROUP = 64


class Settings(NamedTuple):
    """The static settings of a kernel.

    Attributes:
      silu: whether SiLU follows.
      time: tokens in a row.
      steps, lanes, group: steps and channels per block, steps per group.
      interpret: see `mosaic_tpu`.
    """

    silu: bool
    time: int
    steps: int
    lanes: int
    group: int
    interpret: Any


def unsupported_reason(x, weight, bias, initial_state, segments, **_: Any) -> str | None:
    """Why the kernels cannot take a call, or None."""
    if segments is not None and segments.padding != "end":
        return "padding may stand anywhere; expected segment_ids as Segments.of(ids, padding='end')"
    if jax.typeof(x).sharding.spec[1] is not None:
        return f"x is sharded {jax.typeof(x).sharding.spec}; expected whole rows, time not sharded"
    return mosaic_tpu.unavailable(x, weight, bias, initial_state)


def passed_over_reason(x, **_: Any) -> str | None:
    """Why `impl=None` does not take the kernels, or None. Calls that do not fill blocks are left to XLA."""
    if reason := mosaic_tpu.passed_over_reason(x):
        return reason
    if x.shape[1] < STEPS or x.shape[2] < mosaic_tpu.LANES:
        return f"x has {x.shape[1]} steps of {x.shape[2]} channels; a block has {STEPS} of {mosaic_tpu.LANES}"
    return None


def short_conv(x, weight, bias, activation, initial_state, segments):
    """Returns outputs and the final state; the public function and `unsupported_reason` have checked the arguments."""
    batch, _, channels = partition.spec_of(x, heads=2)
    whole = P(batch, None, channels)
    return partition.over_shards(
        functools.partial(_local, activation == "silu"),
        (x, weight, bias, initial_state, segments),
        (whole, P(None, channels), P(channels), whole, P(batch, None)),
        (whole, whole),
    )


def _local(silu, x, weight, bias, state, segments):
    """The convolution on one device."""
    _, time, width = x.shape
    settings = Settings(
        silu,
        time,
        min(STEPS, mosaic_tpu.up(time, max(GROUP, mosaic_tpu.LANES))),
        min(CHANNELS, mosaic_tpu.up(width, mosaic_tpu.LANES)) if width > mosaic_tpu.LANES else width,
        GROUP,
        mosaic_tpu.INTERPRET,
    )
    return _run(settings, x, weight, bias, state, segments)


@functools.partial(jax.jit, static_argnums=0)
def _run(settings, x, weight, bias, state, segments):
    memory = weight.shape[0] - 1
    weight, bias, state = jax.tree.map(lambda v: vary_as(v.astype(jnp.float32), x), (weight, bias, state))
    final = final_state(x, state, segments, memory)
    if state is None:
        state = jnp.zeros_like(x, jnp.float32, shape=(x.shape[0], memory, x.shape[2]))
    state = jnp.pad(state, ((0, 0), (EDGE - memory, 0), (0, 0)))
    biases = () if bias is None else (bias[None],)
    return _convolution(settings, x, weight, biases, state, _marks(segments, memory)), final


def _marks(segments, memory):
    """(b, 2, t): how many tokens before and behind each one its taps may reach, -1 at padding; none without segments."""
    if segments is None:
        return ()
    before, number = token_codes(segments, memory), segments.numbers
    beyond = jnp.pad(number, ((0, 0), (0, memory)))
    behind = sum(
        (beyond[:, k : k + number.shape[1]] == number).astype(jnp.int32) for k in range(1, memory + 1)
    )
    behind = jnp.where(segments.real, behind, -1)
    return (jnp.stack([before, behind], axis=1).astype(jnp.float32),)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolution(settings, x, weight, bias, state, marks):
    """The outputs, in the type of x; state (b, EDGE, d) is what stands before the row."""
    blocks = _Blocks(settings, x, descending=False)
    ((y,),) = blocks.call(
        tpu_kernels.forward,
        [*blocks.inputs(x, weight, bias, state), blocks.marks(marks)],
        [[(x.shape, x.dtype, blocks.steps())]],
        [[blocks.window()], blocks.rows(marks)],
        "short_conv",
    )
    return y


def _forward(settings, x, weight, bias, state, marks):
    return _convolution(settings, x, weight, bias, state, marks), (x, weight, bias, state, marks)


def _backward(settings, residuals, dy):
    x, weight, bias, state, marks = residuals
    blocks = _Blocks(settings, x, descending=True)
    taps, (batch, _, width) = weight.shape[0], x.shape
    (dx,), (dstate,), (sums,) = blocks.call(
        tpu_kernels.backward,
        [
            *blocks.inputs(x, weight, bias, state),
            blocks.marks(marks),
            [(x, blocks.before())],
            [(dy, blocks.steps())],
        ],
        [
            [(x.shape, x.dtype, blocks.steps())],
            [(state.shape, jnp.float32, blocks.row(EDGE))],
            [((batch, taps + 1, width), jnp.float32, blocks.row(taps + 1))],
        ],
        [
            [blocks.window()],
            [blocks.window()],
            [pltpu.VMEM((taps + 1, mosaic_tpu.SUBLANES, settings.lanes), jnp.float32)],
            blocks.rows(marks),
            blocks.rows(marks),
        ],
        "short_conv_backward",
    )
    sums = sums.sum(0)
    dbias = tuple(sums[taps:] for _ in bias)
    return dx, sums[:taps], dbias, dstate, tuple(map(jnp.zeros_like, marks))


_convolution.defvjp(promoting(_forward), promoting(_backward))


class _Blocks:
    """The grid (batch, channels, time) of a pass, and the blocks of its arrays."""

    def __init__(self, settings, x, *, descending):
        self.settings = settings
        self.count = pl.cdiv(settings.time, settings.steps)
        self.grid = x.shape[0], pl.cdiv(x.shape[2], settings.lanes), self.count
        self.place = (lambda i: self.count - 1 - i) if descending else (lambda i: i)

    def call(self, kernel, inputs, outputs, scratch, name):
        run = functools.partial(kernel, self.settings)
        return mosaic_tpu.call(run, self.grid, 2, inputs, outputs, scratch, self.settings.interpret, name)

    def steps(self):
        """Arrays (b, t, d)."""
        block = None, self.settings.steps, self.settings.lanes
        return pl.BlockSpec(block, lambda b, d, i: (b, self.place(i), d))

    def before(self):
        """The last steps of (b, t, d) before a block; for the first block, the first of the row."""
        per_block = self.settings.steps // BEFORE
        block = None, BEFORE, self.settings.lanes
        return pl.BlockSpec(block, lambda b, d, i: (b, jnp.maximum(self.place(i) * per_block - 1, 0), d))

    def row(self, size):
        """Arrays (b, size, d)."""
        return pl.BlockSpec((None, size, self.settings.lanes), lambda b, d, _: (b, 0, d))

    def shared(self, size):
        """Arrays (size, d)."""
        return pl.BlockSpec((size, self.settings.lanes), lambda _, d, __: (0, d))

    def inputs(self, x, weight, bias, state):
        return [
            [(x, self.steps())],
            [(weight, self.shared(weight.shape[0]))],
            [(v, self.shared(1)) for v in bias],
            [(state, self.row(EDGE))],
        ]

    def marks(self, marks):
        """Arrays (b, 2, t), with time on the lanes."""
        spec = pl.BlockSpec((None, 2, self.settings.steps), lambda b, _, i: (b, 0, self.place(i)))
        return [(v, spec) for v in marks]

    def window(self):
        """The steps of a block in float32, and EDGE more beside them, by registers of channels."""
        lanes = min(self.settings.lanes, mosaic_tpu.LANES)
        shape = self.settings.lanes // lanes, EDGE + self.settings.steps, lanes
        return pltpu.VMEM(shape, jnp.float32)

    def rows(self, marks):
        lanes = min(self.settings.lanes, mosaic_tpu.LANES)
        return [pltpu.VMEM((self.settings.steps, lanes), jnp.float32) for _ in marks]
