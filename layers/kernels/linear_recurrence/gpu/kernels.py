"""The Mosaic GPU kernels of `linear_recurrence`: forward, backward, and the effect of a piece of time on the state.

A program of 128 lanes takes one row of the batch, `width` neighbouring channels and one piece of the time axis. Asynchronous
copies bring tiles of `steps` x `width` numbers into shared memory, `stages` of them in flight. Every lane runs through its
own channels, with the state in registers, and whole tiles of results leave by asynchronous copies. So each input is read
once and each output is written once:

    forward   reads a, x           writes h         2 FLOPs per element (real), 8 (complex)
    backward  reads a, h, dh       writes da, dx    3 FLOPs per element (real), 14 (complex)

At 3.0 TB/s and 8 x 4096 x 2048 float32 that is 0.27 ms forward and 0.45 ms backward. The arithmetic, 0.13 and 0.20
GFLOP, takes less than 0.01 ms. A step of the chain, with its loads from shared memory and stores into it, takes 20 ns
forward and 27 backward, so 4096 steps take 0.08 and 0.11 ms. The copies in flight, 24 to 96 KB per multiprocessor, cover
the latency of memory. Memory bounds both passes.

Where rows and channels are too few to fill the GPU, time is cut into pieces. A first launch reads a and x and writes the
effect of each piece on the state, two numbers per channel. Every program of the second launch composes the effects of the
pieces before its own. The forward pass then moves 5 numbers per element instead of 3, the backward pass 7 instead of 5;
small calls find the second reading in the L2 cache. `_plan` estimates whether that pays. A single launch in which each piece
waits for the state of the one before (decoupled look-back) would save the second reading, but programs would wait for
programs that may not be running.

A complex array is two arrays, real and imaginary: XLA removes `real(complex(re, im))` on both sides of the call. Where it
cannot, because the array is in memory, separating the parts bounds the call. The tail of the sequence and channels beyond
the last need no masks: copies into shared memory fill with zeros beyond the ends of an array, and copies out write nothing
there, unless what they copy is contiguous in memory.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from layers.kernels.mosaic_gpu import LANES, SHARED_BYTES, launch, pl, plgpu, strided

Planes = tuple[Any, ...]  # one array (or ref) if real, two if complex

KEPT, RESET, SKIPPED = 0, 1, 2  # codes of a token: an ordinary one, the first of a segment, padding

_PROCESSORS = 132  # of an H100
_MAX_PIECES = 64
_GROUP = 4  # pieces whose effects are loaded together

# The estimates behind the number of pieces, in nanoseconds: a step of the chain, one more launch, and composing a piece.
_BYTES_A_NS = 3000.0
_FORWARD_STEP_NS, _BACKWARD_STEP_NS = 20.0, 27.0
_LAUNCH_NS = 4000.0
_PIECE_NS = 100.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """The layout of a kernel.

    Attributes:
      vector: neighbouring channels per lane, 1 or 2; a copy takes at most 256 channels.
      steps: time steps per tile.
      stages: tiles of inputs in shared memory, in flight or in use.
      unroll: steps whose inputs are loaded into registers together.
      pieces: number of pieces of the time axis; chosen by shape if None.
      fold: whether parts of time fill the lanes that few channels leave idle (folded.py); if None, for complex numbers.
    """

    vector: int = 1
    steps: int = 16
    stages: int = 4
    unroll: int = 8
    pieces: int | None = None
    fold: bool | None = None

    @property
    def width(self) -> int:
        return LANES * self.vector


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The shapes of one launch: batch, time, channels; tiles per piece; pieces; direction."""

    batch: int
    time: int
    channels: int
    settings: Settings
    reverse: bool
    tiles: int
    pieces: int

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.channels, self.settings.width)

    @property
    def padded(self) -> int:
        return self.blocks * self.settings.width

    @property
    def grid(self) -> dict[str, int]:
        return {"row": self.batch, "piece": self.pieces, "channel": self.blocks}


def _plan(
    shape: tuple[int, ...],
    settings: Settings,
    reverse: bool,
    arriving: Sequence[Planes],
    leaving: Sequence[Planes],
    again: Sequence[Planes],
    step_ns: float,
) -> _Plan:
    """Fits the tiles to the shape and to shared memory, and cuts time into pieces.

    Args:
      arriving, leaving: what is read and written in tiles.
      again: what is read twice if time is cut.
      step_ns: time that a step of the chain takes.
    """
    batch, time, channels = shape
    steps = min(settings.steps, pl.cdiv(time, 8) * 8)
    a_step = settings.width * (settings.stages * _bytes(arriving) + 2 * _bytes(leaving))
    while (steps + 1) * a_step > SHARED_BYTES - 2048 and steps > 8:
        steps //= 2
    settings = dataclasses.replace(settings, steps=steps, unroll=min(settings.unroll, steps))
    total = pl.cdiv(time, steps)
    blocks = batch * pl.cdiv(channels, settings.width)
    at_once = _PROCESSORS * max(1, SHARED_BYTES // ((steps + 1) * a_step + 2048))
    once, twice = (
        batch * time * channels * _bytes(groups) / _BYTES_A_NS for groups in ([*arriving, *leaving], again)
    )

    def nanoseconds(pieces: int) -> float:
        chain = pl.cdiv(blocks * pieces, at_once) * pl.cdiv(total, pieces) * steps * step_ns
        if pieces == 1:
            return math.hypot(once, chain)
        return math.hypot(once + twice, 2 * chain) + _LAUNCH_NS + pieces * _PIECE_NS

    pieces = settings.pieces or min(range(1, _MAX_PIECES + 1), key=nanoseconds)
    tiles = pl.cdiv(total, min(pieces, total))
    return _Plan(batch, time, channels, settings, reverse, tiles, pl.cdiv(total, tiles))


def forward(
    a: Planes,
    x: Planes,
    codes: jax.Array | None,
    state: Planes,
    reverse: bool,
    dtype: Any,
    settings: Settings,
) -> tuple[Planes, Planes]:
    """Returns every state, in `dtype`, and the last, in float32.

    Args:
      a: (b or 1, t or 1, d).
      x: (b, t, d).
      codes: (b, t), or (b, t, d) if it differs between channels, int32: what each token does to the state.
      state: (b, d), float32: the state that enters.
    """
    staged = tuple(jax.ShapeDtypeStruct(x[0].shape, dtype) for _ in state)
    plan = _plan(x[0].shape, settings, reverse, (a, x, _each(codes)), (staged,), (a, x), _FORWARD_STEP_NS)
    effects = _effects(a, x, codes, plan, multiply_last=False) if plan.pieces > 1 else None
    width, steps = plan.settings.width, plan.settings.steps
    inputs = {"x": x, "state": _pad(state, plan), **_decay_inputs(a, plan), **_optional(codes, effects)}
    outputs = {
        "h": staged,
        "final": tuple(jax.ShapeDtypeStruct((plan.batch, plan.padded), jnp.float32) for _ in state),
    }
    scratch = {
        **_buffers(plan, 0, x=x, **_moving(a), **_codes(codes)),
        "h_tiles": tuple(plgpu.SMEM((2, steps, width), dtype) for _ in state),
    }

    def body(*, x, state, h, final, h_tiles, x_tiles, **refs):
        block = _Block(plan, refs, {"x": (x, x_tiles)})
        entering = block.enter(tuple(block.channel(ref) for ref in state))

        def tile(index, slot, turn, carry):
            plgpu.wait_smem_to_gmem(len(h), wait_read_only=True)

            def run(rows, carry):
                read = [(block.decay(slot, row), block.read(x_tiles, slot, row)) for row in rows]
                marks = [block.mark(slot, row) for row in rows]
                for row, (decay, value), mark in zip(rows, read, marks, strict=True):
                    carry = plus(times(_masked(decay, mark), carry), _unless(mark, (SKIPPED,), value))
                    _write(h_tiles, turn, row, carry)
                return carry

            carry = block.rows(index, run, carry)
            block.send(index, turn, zip(h_tiles, h, strict=True))
            return carry

        last = block.stream(tile, entering)
        block.leave(final, last)

    results = launch(
        body, name="linear_recurrence", grid=plan.grid, inputs=inputs, outputs=outputs, scratch=scratch
    )
    return results["h"], _cut(results["final"], plan)


def backward(
    a: Planes,
    h: Planes,
    dh: Planes,
    codes: jax.Array | None,
    state: Planes,
    dfinal: Planes,
    reverse: bool,
    input_type: tuple[int, Any],
    settings: Settings,
) -> tuple[Planes, Planes, Planes]:
    """Returns the gradients of a (before any sum over b), x and the entering state; arguments as for `forward`.

    Args:
      input_type: the number of planes of x and their type.
    """
    constant = a[0].shape[1] == 1
    out_a = jnp.float32 if a[0].shape[0] != h[0].shape[0] else a[0].dtype
    planes_x, out_x = input_type
    staged = () if constant else tuple(jax.ShapeDtypeStruct(h[0].shape, out_a) for _ in a)
    gradients_x = tuple(jax.ShapeDtypeStruct(h[0].shape, out_x) for _ in range(planes_x))
    plan = _plan(
        h[0].shape,
        settings,
        not reverse,
        (a, h, dh, _each(codes)),
        (staged, gradients_x),
        (a, dh),
        _BACKWARD_STEP_NS,
    )
    effects = _effects(a, dh, codes, plan, multiply_last=True) if plan.pieces > 1 else None
    width, steps = plan.settings.width, plan.settings.steps
    total = tuple(jax.ShapeDtypeStruct((plan.batch, plan.pieces, plan.padded), jnp.float32) for _ in a)
    inputs = {
        "h": h,
        "dh": dh,
        "state": _pad(state, plan),
        "dfinal": _pad(dfinal, plan),
        **_decay_inputs(a, plan),
        **_optional(codes, effects),
    }
    outputs = {
        "da": total if constant else staged,
        "dx": gradients_x,
        "dstate": tuple(jax.ShapeDtypeStruct((plan.batch, plan.padded), jnp.float32) for _ in state),
    }
    scratch = {
        **_buffers(plan, 2 * len(h), dh=dh, **_moving(a), **_codes(codes)),
        # One row more, for the state before the tile.
        "h_tiles": tuple(plgpu.SMEM((plan.settings.stages, steps + 1, width), p.dtype) for p in h),
        "da_tiles": tuple(plgpu.SMEM((2, steps, width), s.dtype) for s in staged),
        "dx_tiles": tuple(plgpu.SMEM((2, steps, width), s.dtype) for s in gradients_x),
    }
    # Row r of a tile is row r + offset of h_tiles, and the state before it is at r + 1 - offset.
    offset, time = (0 if reverse else 1), plan.time

    def body(*, h, dh, state, dfinal, da, dx, dstate, h_tiles, dh_tiles, da_tiles, dx_tiles, **refs):
        block = _Block(plan, refs, {"dh": (dh, dh_tiles)})
        entering = block.enter(tuple(block.channel(ref) for ref in dfinal))

        def before(index, slot):
            first = index * steps
            edge = jnp.minimum(first + steps, time - 1) if reverse else jnp.maximum(first - 1, 0)
            for ref, tiles in zip(h, h_tiles, strict=True):
                yield (
                    ref.at[block.row, pl.ds(first, steps), block.channels],
                    tiles.at[slot, pl.ds(offset, steps)],
                )
                yield (
                    ref.at[block.row, pl.ds(edge, 1), block.channels],
                    tiles.at[slot, pl.ds(steps if reverse else 0, 1)],
                )

        def tile(index, slot, turn, carry):
            plgpu.wait_smem_to_gmem(len(da_tiles) + len(dx_tiles), wait_read_only=True)
            first = index * steps

            @pl.when(first + steps >= time if reverse else first == 0)
            def _():  # the sequence begins here: the state before it is the one that entered
                for ref, tiles in zip(state, h_tiles, strict=True):
                    tiles[slot, (time - first if reverse else 0)] = block.channel(ref).astype(tiles.dtype)

            def run(rows, carry):
                decays = [block.decay(slot, row) for row in rows]
                cotangents = [block.read(dh_tiles, slot, row) for row in rows]
                states = [block.read(h_tiles, slot, row + 1 - offset) for row in rows]
                marks = [block.mark(slot, row) for row in rows]
                c, sums = carry
                for row, decay, cotangent, state, mark in zip(
                    rows, decays, cotangents, states, marks, strict=True
                ):
                    g = plus(cotangent, c)
                    c = times(_masked(decay, mark), g)
                    gradient = _unless(mark, (RESET, SKIPPED), times(g, state)[: len(a)])
                    if constant:
                        sums = plus(sums, gradient)
                    else:
                        _write(da_tiles, turn, row, gradient)
                    _write(dx_tiles, turn, row, _unless(mark, (SKIPPED,), g[:planes_x]))
                return c, sums

            carry = block.rows(index, run, carry)
            results = () if constant else zip(da_tiles, da, strict=True)
            block.send(index, turn, [*results, *zip(dx_tiles, dx, strict=True)])
            return carry

        zeros = tuple(jnp.zeros_like(entering[0]) for _ in a) if constant else ()
        c, sums = block.stream(tile, (entering, zeros), before)
        for ref, value in zip(da if constant else (), sums, strict=True):
            ref[block.row, block.piece, block.channels] = value
        block.leave(dstate, c)

    results = launch(
        body,
        name="linear_recurrence_backward",
        grid=plan.grid,
        inputs=inputs,
        outputs=outputs,
        scratch=scratch,
    )
    da = results["da"]
    if constant:
        da = tuple(p[..., : plan.channels].sum(1, keepdims=True) for p in da)
    return da, results["dx"], _cut(results["dstate"], plan)


def effects(
    a: Planes, x: Planes, codes: jax.Array | None, reverse: bool, multiply_last: bool, settings: Settings
) -> tuple[Planes, Planes]:
    """Returns the decay and the contribution of the whole of time, (b, d) each; arguments as for `forward`."""
    settings = dataclasses.replace(settings, pieces=1)
    plan = _plan(x[0].shape, settings, reverse, (a, x, _each(codes)), (), (), _FORWARD_STEP_NS)
    decay, contribution = _effects(a, x, codes, plan, multiply_last)
    return tuple(_cut(tuple(p[:, 0] for p in planes), plan) for planes in (decay, contribution))


def _effects(
    a: Planes, x: Planes, codes: jax.Array | None, plan: _Plan, multiply_last: bool
) -> tuple[Planes, Planes]:
    """The decay and the contribution of every piece: state -> decay state + contribution; (b, pieces, d) each.

    A step is state -> a state + x, or state -> a (state + x) if `multiply_last`.
    """
    planes = max(len(a), len(x))
    settings = plan.settings
    sums = jax.ShapeDtypeStruct((plan.batch, plan.pieces, plan.padded), jnp.float32)
    inputs = {"x": x, **_decay_inputs(a, plan), **_optional(codes, None)}
    outputs = {"decay": (sums,) * len(a), "contribution": (sums,) * planes}

    def body(*, x, decay, contribution, x_tiles, **refs):
        block = _Block(plan, refs, {"x": (x, x_tiles)})

        def tile(index, slot, _, carry):
            def run(rows, carry):
                total, state = carry
                read = [(block.decay(slot, row), block.read(x_tiles, slot, row)) for row in rows]
                marks = [block.mark(slot, row) for row in rows]
                for (a, value), mark in zip(read, marks, strict=True):
                    a = _masked(a, mark)
                    if multiply_last:
                        state = times(a, plus(state, value))
                    else:
                        state = plus(times(a, state), _unless(mark, (SKIPPED,), value))
                    total = times(a, total)
                return total, state

            carry = block.rows(index, run, carry)
            plgpu.commit_smem()
            return carry

        zero = jnp.zeros((settings.width,), jnp.float32)
        zero = plgpu.layout_cast(zero, plgpu.Layout.WG_STRIDED((settings.width,), vec_size=settings.vector))
        one = (zero + 1.0, zero)[: len(a)]
        results = block.stream(tile, (one, (zero,) * planes))
        for refs_out, values in zip((decay, contribution), results, strict=True):
            for ref, value in zip(refs_out, values, strict=True):
                ref[block.row, block.piece, block.channels] = value

    results = launch(
        body,
        name="linear_recurrence_effects",
        grid=plan.grid,
        inputs=inputs,
        outputs=outputs,
        scratch=_buffers(plan, 0, x=x, **_moving(a), **_codes(codes)),
    )
    return results["decay"], results["contribution"]


class _Block:
    """What one program of a launch does; `arriving` are the arrays that come in tiles besides a and codes."""

    def __init__(self, plan: _Plan, refs: dict[str, Any], arriving: dict[str, tuple[Planes, Planes]]):
        self.plan, self.width = plan, plan.settings.width
        self.row, self.piece = jax.lax.axis_index("row"), jax.lax.axis_index("piece")
        self.channels = pl.ds(jax.lax.axis_index("channel") * self.width, self.width)
        self._barriers = refs["barriers"]
        self._effects = refs.get("effects")
        self._codes = refs.get("codes_tiles")
        self._a_tiles = refs.get("a_tiles")
        a = refs["a"]
        self._a_row = self.row if a[0].shape[0] > 1 else 0
        self._constant = (
            None if self._a_tiles else tuple(self._load(p.at[self._a_row, self.channels]) for p in a)
        )
        self._arriving = dict(arriving)
        if self._a_tiles:
            self._arriving["a"] = (a, self._a_tiles)
        self._codes_source = refs["codes"][0] if self._codes else None

    def _load(self, ref: Any) -> jax.Array:
        return strided(ref, self.width).astype(jnp.float32)

    def channel(self, ref: Any) -> jax.Array:
        """This program's channels of an array (b, d)."""
        # The product removes the mark of arrays that differ between devices, which loops do not accept.
        return 1.0 * self._load(ref.at[self.row, self.channels])

    def read(self, tiles: Planes, slot: Any, row: Any) -> Planes:
        return tuple(self._load(p.at[slot, row]) for p in tiles)

    def decay(self, slot: Any, row: Any) -> Planes:
        return self._constant or self.read(self._a_tiles, slot, row)

    def mark(self, slot: Any, row: Any) -> Any:
        """The code of a token, shared by all lanes or one per lane; None if there are no segments."""
        if self._codes is None:
            return None
        tiles = self._codes[0]
        return tiles[slot, row] if len(tiles.shape) == 2 else strided(tiles.at[slot, row], self.width)

    def enter(self, state: Planes) -> Planes:
        """The state that enters this piece, from the one that enters the sequence."""
        if self._effects is None:
            return state
        decay, contribution = self._effects

        def load(planes, piece):
            piece = jnp.minimum(piece, self.plan.pieces - 1)
            return tuple(self._load(p.at[self.row, piece, self.channels]) for p in planes)

        def group(number, state):
            earlier = [_GROUP * number + i for i in range(_GROUP)]
            parts = [(load(decay, piece), load(contribution, piece)) for piece in earlier]
            for piece, (a, x) in zip(earlier, parts, strict=True):
                passed = jnp.broadcast_to(piece < self.piece, (self.width,))
                after = plus(times(a, state), x)
                state = tuple(jnp.where(passed, new, old) for new, old in zip(after, state, strict=True))
            return state

        return jax.lax.fori_loop(0, jax.lax.div(self.piece + _GROUP - 1, _GROUP), group, state)

    def leave(self, refs: Planes, state: Planes) -> None:
        """Writes the state after the last piece to (b, d)."""

        @pl.when(self.piece == self.plan.pieces - 1)
        def _():
            for ref, value in zip(refs, state, strict=True):
                ref[self.row, self.channels] = value

        plgpu.wait_smem_to_gmem(0)

    def stream(self, tile: Callable[..., Any], carry: Any, more: Callable[..., Any] = lambda *_: ()) -> Any:
        """Runs `tile(index, slot, turn, carry)` over the tiles of this piece in the running direction.

        Args:
          tile: reads the inputs in `slot`; must fence them (`send` does); `turn` is 0, 1, 0, ...
          more: further copies per tile, as pairs of source and destination.
        """
        plan, stages, steps = self.plan, self.plan.settings.stages, self.plan.settings.steps
        total = pl.cdiv(plan.time, steps)
        start = self.piece * plan.tiles
        count = plan.tiles if total % plan.tiles == 0 else jnp.minimum(plan.tiles, total - start)

        def place(turn):
            return total - 1 - (start + turn) if plan.reverse else start + turn

        def fetch(turn, slot):
            index = place(turn)
            rows, barrier = pl.ds(index * steps, steps), self._barriers.at[slot]
            for name, (sources, tiles) in self._arriving.items():
                line = self._a_row if name == "a" else self.row
                for source, target in zip(sources, tiles, strict=True):
                    plgpu.copy_gmem_to_smem(source.at[line, rows, self.channels], target.at[slot], barrier)
            if self._codes:
                each = len(self._codes[0].shape) == 3
                source = self._codes_source.at[(self.row, rows, self.channels) if each else (self.row, rows)]
                plgpu.copy_gmem_to_smem(source, self._codes[0].at[slot, pl.ds(0, steps)], barrier)
            for source, target in more(index, slot):
                plgpu.copy_gmem_to_smem(source, target, barrier)

        for turn in range(min(stages, plan.tiles)):
            pl.when(turn < count)(functools.partial(fetch, turn, turn))

        def step(turn, carry):
            slot = jax.lax.rem(turn, stages)
            plgpu.barrier_wait(self._barriers.at[slot])
            carry = tile(place(turn), slot, jax.lax.rem(turn, 2), carry)
            pl.when(turn + stages < count)(lambda: fetch(turn + stages, slot))
            return carry

        return jax.lax.fori_loop(0, count, step, carry)

    def rows(self, index: Any, run: Callable[..., Any], carry: Any) -> Any:
        """Runs `run(rows, carry)` over groups of rows of a tile in the running direction."""
        steps, unroll = self.plan.settings.steps, self.plan.settings.unroll
        whole = self.plan.time % steps == 0
        count = steps if whole else jnp.minimum(steps, self.plan.time - index * steps)

        def group(size):
            def go(number, carry):
                places = [number * size + i for i in range(size)]
                return run([count - 1 - p for p in places] if self.plan.reverse else places, carry)

            return go

        groups = steps // unroll if whole else jax.lax.div(count, unroll)
        carry = jax.lax.fori_loop(0, groups, group(unroll), carry)
        if whole and steps % unroll == 0:
            return carry
        return jax.lax.fori_loop(groups * unroll, count, group(1), carry)

    def send(self, index: Any, turn: Any, results: Any) -> None:
        """Starts copies of tiles of results, once all lanes have written them and read the inputs."""
        plgpu.commit_smem()
        time, steps = self.plan.time, self.plan.settings.steps
        first, pairs = index * steps, list(results)

        def copy(row, count):
            for tiles, ref in pairs:
                target = ref.at[self.row, pl.ds(first + row, count), self.channels]
                plgpu.copy_smem_to_gmem(tiles.at[turn, pl.ds(row, count)], target)

        if time % steps == 0 or self.plan.channels != self.width:
            copy(0, steps)
            return
        # A tile of all channels is contiguous in memory, and its copy would not end where the row of the batch ends.
        pl.when(first + steps <= time)(lambda: copy(0, steps))

        @pl.when(first + steps > time)
        def _():
            jax.lax.fori_loop(0, time - first, lambda row, _: copy(row, 1), None)


def _bytes(groups: Sequence[Planes]) -> int:
    """Bytes per step and channel of every array that comes in tiles."""
    return sum(p.dtype.itemsize for planes in groups for p in planes if p.shape[1] > 1)


def _decay_inputs(a: Planes, plan: _Plan) -> dict[str, Planes]:
    """Returns a decay that is the same at all times as (b or 1, padded d), float32."""
    if a[0].shape[1] > 1:
        return {"a": a}
    return {"a": _pad(tuple(p[:, 0].astype(jnp.float32) for p in a), plan)}


def _moving(a: Planes) -> dict[str, Planes]:
    return {"a": a} if a[0].shape[1] > 1 else {}


def _codes(codes: jax.Array | None) -> dict[str, Planes]:
    return {} if codes is None else {"codes": (codes,)}


def _each(codes: jax.Array | None) -> Planes:
    """Codes that differ between channels, as an array that arrives in tiles."""
    return () if codes is None or codes.ndim == 2 else (codes,)


def _optional(codes: jax.Array | None, effects: tuple[Planes, Planes] | None) -> dict[str, Any]:
    """Codes as copies need them, with rows of a multiple of 16 bytes, and effects."""
    given: dict[str, Any] = {}
    if codes is not None:
        given["codes"] = _each(codes) or (jnp.pad(codes, ((0, 0), (0, -codes.shape[1] % 4))),)
    if effects is not None:
        given["effects"] = effects
    return given


def _buffers(plan: _Plan, more: int, **arriving: Planes) -> dict[str, Any]:
    """Shared memory of the arrays that arrive in tiles, and the barriers of the stages, for `more` further copies."""
    stages, steps, width = plan.settings.stages, plan.settings.steps, plan.settings.width
    # Every stage must start at a multiple of 128 bytes.
    by_token = stages, pl.cdiv(steps, 32) * 32
    buffers: dict[str, Any] = {
        f"{name}_tiles": tuple(
            plgpu.SMEM((stages, steps, width) if p.ndim == 3 else by_token, p.dtype) for p in planes
        )
        for name, planes in arriving.items()
    }
    copies = more + sum(map(len, arriving.values()))
    return buffers | {"barriers": plgpu.Barrier(num_arrivals=copies, num_barriers=stages)}


def _pad(planes: Sequence[jax.Array], plan: _Plan) -> Planes:
    """(b, d) with channels padded to whole blocks."""
    return tuple(jnp.pad(p, ((0, 0), (0, plan.padded - plan.channels))) for p in planes)


def _cut(planes: Planes, plan: _Plan) -> Planes:
    return tuple(p[:, : plan.channels] for p in planes)


def _write(tiles: Planes, turn: Any, row: Any, values: Planes) -> None:
    for p, value in zip(tiles, values, strict=True):
        p[turn, row] = value.astype(p.dtype)


def times(p: Planes, q: Planes) -> Planes:
    """The product of two numbers, real or complex."""
    if len(p) == len(q) == 2:
        return p[0] * q[0] - p[1] * q[1], p[0] * q[1] + p[1] * q[0]
    return tuple(u * v for u in p for v in q)


def plus(p: Planes, q: Planes) -> Planes:
    """The sum of two numbers, real or complex."""
    short, long = sorted((p, q), key=len)
    return tuple(u + v for u, v in zip(short, long, strict=False)) + tuple(long[len(short) :])


def _masked(decay: Planes, mark: Any) -> Planes:
    """The decay with segments applied: 0 at a reset, 1 at padding."""
    if mark is None:
        return decay
    shape = decay[0].shape
    kept = jnp.broadcast_to(mark == KEPT, shape)
    instead = jnp.broadcast_to(jnp.where(mark == SKIPPED, 1.0, 0.0), shape)
    return tuple(jnp.where(kept, p, instead if i == 0 else 0.0 * instead) for i, p in enumerate(decay))


def _unless(mark: Any, codes: tuple[int, ...], value: Planes) -> Planes:
    """Zero where the token has one of these codes."""
    if mark is None:
        return value
    hit = functools.reduce(jnp.logical_or, [mark == code for code in codes])
    return tuple(jnp.where(jnp.broadcast_to(hit, p.shape), jnp.zeros_like(p), p) for p in value)
