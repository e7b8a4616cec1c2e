"""How the kernels of `short_conv` walk through memory: layouts, pieces of time, and tiles that come and go by copies.

A program of 128 lanes takes one row of the batch, `width` neighbouring channels and one piece of the time axis. Asynchronous
copies bring tiles of `steps` x `width` numbers into shared memory, `stages` of them in flight. Pieces do not wait for each
other: a program also reads the few tokens beside its piece that taps reach.

The tail of the sequence and channels beyond the last need no masks in copies: copies into shared memory fill with zeros
beyond the ends of an array, and copies out write nothing there, unless what they copy is contiguous in memory. Such a copy
goes on into the next row. Those are the tiles that hold all channels (`overruns`), and single rows of tiles.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from layers.kernels.mosaic_gpu import LANES, SHARED_BYTES, pl, plgpu, strided

Values = tuple[jax.Array, ...]

FEWEST_ROWS = (
    2  # of a tile of results in a copy, which stops at the last channel only if it is not contiguous
)

_PROCESSORS = 132  # of an H100
_MAX_PIECES = 64
_FEWEST, _RESIDENT = 2, 4  # programs per processor, for which tiles are cut, and that registers allow
_START_STEPS = 16  # steps that take as long as starting and ending a piece
_CODES = 8  # tokens in a copy of codes beside a piece, at least the 7 that 8 taps reach


@dataclasses.dataclass(frozen=True)
class Settings:
    """The layout of a kernel.

    Attributes:
      vector: neighbouring channels per lane, 1 or 2; a copy takes at most 256 channels.
      steps: time steps per tile, a multiple of 8.
      stages: tiles of inputs in shared memory, in flight or in use.
      unroll: steps whose inputs are loaded into registers together, a divisor of `steps`, at least 8.
      pieces: number of pieces of the time axis; chosen by shape if None.
    """

    vector: int = 2
    steps: int = 16
    stages: int = 2
    unroll: int = 8
    pieces: int | None = None

    @property
    def width(self) -> int:
        return LANES * self.vector


@dataclasses.dataclass(frozen=True)
class Plan:
    """The shapes of one launch: batch, time, channels; tokens before the current one that taps reach; tiles per piece."""

    batch: int
    time: int
    channels: int
    memory: int
    settings: Settings
    tiles: int
    pieces: int

    @property
    def padded(self) -> int:
        """Channels in whole blocks."""
        return pl.cdiv(self.channels, self.settings.width) * self.settings.width

    @property
    def grid(self) -> dict[str, int]:
        return {"row": self.batch, "piece": self.pieces, "channel": self.padded // self.settings.width}

    @property
    def ragged(self) -> bool:
        """Whether the last tile reaches beyond the end of time."""
        return self.time % self.settings.steps != 0

    @property
    def overruns(self) -> bool:
        """Whether copies of the last tile go on into the next row of the batch."""
        return self.ragged and self.channels == self.settings.width


def plan_of(
    shape: tuple[int, ...], memory: int, settings: Settings, arriving: int, leaving: int, edge: int
) -> Plan:
    """Fits the tiles to the shape and to shared memory, and cuts time into pieces that fill the processors.

    Args:
      arriving, leaving, edge: bytes per token and channel that are read and written in tiles, and read beside a piece.
    """
    batch, time, channels = shape
    # The first copy of results leaves `memory` rows out.
    least = 8 if memory + FEWEST_ROWS <= 8 else 16
    steps = max(least, min(settings.steps, pl.cdiv(time, 8) * 8))
    stages, width = settings.stages, settings.width

    def taken(steps: int) -> int:
        return width * (steps * (stages * arriving + 2 * leaving) + memory * edge) + 4096

    while taken(steps) > SHARED_BYTES // _FEWEST and steps > least:
        steps = max(least, steps // 16 * 8)
    unroll = max(8, math.gcd(steps, settings.unroll))
    settings = dataclasses.replace(settings, steps=steps, unroll=unroll)
    total = pl.cdiv(time, steps)
    blocks = batch * pl.cdiv(channels, width)
    at_once = _PROCESSORS * max(1, min(_RESIDENT, SHARED_BYTES // taken(steps)))

    def duration(pieces: int) -> int:
        return pl.cdiv(blocks * pieces, at_once) * (pl.cdiv(total, pieces) * steps + _START_STEPS)

    pieces = settings.pieces or min(range(1, _MAX_PIECES + 1), key=duration)
    tiles = pl.cdiv(total, min(pieces, total))
    return Plan(batch, time, channels, memory, settings, tiles, pl.cdiv(total, tiles))


def buffers(plan: Plan, codes: bool, copies_beside: int, **arriving: Any) -> dict[str, Any]:
    """Shared memory of the arrays that arrive in tiles, by name with their types, and the barriers of copies."""
    stages, steps, width = plan.settings.stages, plan.settings.steps, plan.settings.width
    scratch: dict[str, Any] = {
        f"{name}_tiles": plgpu.SMEM((stages, steps, width), dtype) for name, dtype in arriving.items()
    }
    if codes:
        # Every stage must start at a multiple of 128 bytes.
        scratch["codes_tiles"] = plgpu.SMEM((stages, pl.cdiv(steps, 32) * 32), jnp.int32)
    return scratch | {
        "barriers": plgpu.Barrier(num_arrivals=len(arriving) + codes, num_barriers=stages),
        "beside": plgpu.Barrier(num_arrivals=copies_beside, num_barriers=1),
    }


class Block:
    """What one program of a launch does; `refs` are its named refs, `arriving` names those that come in tiles."""

    def __init__(self, plan: Plan, refs: Mapping[str, Any], *arriving: str):
        self.plan, self.width = plan, plan.settings.width
        self.row, self.piece = jax.lax.axis_index("row"), jax.lax.axis_index("piece")
        self.channels = pl.ds(jax.lax.axis_index("channel") * self.width, self.width)
        self.start = self.piece * (plan.tiles * plan.settings.steps)
        self.end = self.start + plan.tiles * plan.settings.steps
        self._refs, self._arriving = refs, arriving
        self._codes = refs.get("codes")

    def load(self, ref: Any) -> jax.Array:
        """`width` numbers as float32."""
        return strided(ref, self.width).astype(jnp.float32)

    def channel(self, ref: Any) -> jax.Array:
        """This program's channels of an array in device memory, whose last axis they are."""
        # The product removes the mark of arrays that differ between devices, which loops do not accept.
        return 1.0 * self.load(ref.at[self.channels])

    def zeros(self) -> jax.Array:
        layout = plgpu.Layout.WG_STRIDED((self.width,), vec_size=self.plan.settings.vector)
        return plgpu.layout_cast(jnp.zeros((self.width,), jnp.float32), layout)

    def scalar(self, condition: Any) -> jax.Array:
        """A condition for all lanes, as `jnp.where` takes it."""
        return jnp.broadcast_to(condition, (self.width,))

    def count(self, *place: Any, tiles: str = "codes_tiles") -> Any:
        """The code of a token; None if there are no segments."""
        return None if self._codes is None else self._refs[tiles][place]

    def fetch_beside(self, *after: str) -> None:
        """Starts the copies of the inputs before this piece, and of the tokens of `after` that follow it.

        Where there are none, they bring others, which must not be used.
        """
        memory, barrier = self.plan.memory, self._refs["beside"].at[0]
        first = jnp.where(self.piece > 0, self.start - memory, 0)
        behind = jnp.where(self.end < self.plan.time, self.end, 0)
        copies = [("x", first, "x_before"), *((name, behind, f"{name}_after") for name in after)]
        for name, at, target in copies:
            source = self._refs[name].at[self.row, pl.ds(at, memory), self.channels]
            plgpu.copy_gmem_to_smem(source, self._refs[target], barrier)
        if after and self._codes is not None:
            source = self._codes.at[self.row, pl.ds(behind, _CODES)]
            plgpu.copy_gmem_to_smem(source, self._refs["codes_after"].at[pl.ds(0, _CODES)], barrier)

    def enter(self) -> Values:
        """The inputs before this piece, oldest first, once they are there: the initial state at the beginning of time."""
        plgpu.barrier_wait(self._refs["beside"].at[0])
        state = self._refs.get("state")
        window = []
        for i in range(self.plan.memory):
            value = self.zeros() if state is None else self.channel(state.at[self.row, i])
            value = jnp.where(self.scalar(self.piece == 0), value, self.load(self._refs["x_before"].at[i]))
            window.append(value)
        return tuple(window)

    def stream(self, tile: Callable[..., Any], carry: Any) -> Any:
        """Runs `tile(number, first, slot, carry)` over the tiles of this piece; returns the number of tiles and the carry.

        Args:
          tile: reads the inputs in `slot`, of the tokens from `first` on, and must fence them (`send` does).
        """
        plan, stages, steps = self.plan, self.plan.settings.stages, self.plan.settings.steps
        total = pl.cdiv(plan.time, steps)
        whole = total % plan.tiles == 0
        count = plan.tiles if whole else jnp.minimum(plan.tiles, total - self.piece * plan.tiles)

        def fetch(number: Any, slot: Any) -> None:
            rows, barrier = pl.ds(self.start + number * steps, steps), self._refs["barriers"].at[slot]
            for name in self._arriving:
                source = self._refs[name].at[self.row, rows, self.channels]
                plgpu.copy_gmem_to_smem(source, self._refs[f"{name}_tiles"].at[slot], barrier)
            if self._codes is not None:
                target = self._refs["codes_tiles"].at[slot, pl.ds(0, steps)]
                plgpu.copy_gmem_to_smem(self._codes.at[self.row, rows], target, barrier)

        for number in range(min(stages, plan.tiles)):
            pl.when(number < count)(functools.partial(fetch, number, number))

        def step(number: Any, carry: Any) -> Any:
            slot = jax.lax.rem(number, stages)
            plgpu.barrier_wait(self._refs["barriers"].at[slot])
            carry = tile(number, self.start + number * steps, slot, carry)
            pl.when(number + stages < count)(lambda: fetch(number + stages, slot))
            return carry

        return count, jax.lax.fori_loop(0, count, step, carry)

    def rows(self, run: Callable[..., Any], carry: Any, apart: bool = False) -> Any:
        """Runs `run(rows, carry)` over groups of rows of a tile; the first group with Python integers if `apart`."""
        size = self.plan.settings.unroll
        if apart:
            carry = run(list(range(size)), carry)

        def group(number: Any, carry: Any) -> Any:
            return run([number * size + i for i in range(size)], carry)

        return jax.lax.fori_loop(int(apart), self.plan.settings.steps // size, group, carry)

    def send(self, tiles: Any, slot: Any, ref: Any, first: Any, rows: int, skip: int = 0) -> None:
        """Starts the copy of rows `skip` to `rows` of a tile of results, whose row `skip` is token `first`.

        `plgpu.commit_smem` comes before it.
        """
        time, count = self.plan.time, rows - skip

        def copy(row: Any, number: int) -> None:
            target = ref.at[self.row, pl.ds(first + row, number), self.channels]
            plgpu.copy_smem_to_gmem(tiles.at[slot, pl.ds(skip + row, number)], target)

        if not self.plan.ragged:
            copy(0, count)
            return
        if not self.plan.overruns:
            pl.when(first < time)(lambda: copy(0, count))
            return
        pl.when(first + count <= time)(lambda: copy(0, count))

        @pl.when(first + count > time)
        def _():
            jax.lax.fori_loop(0, jnp.maximum(time - first, 0), lambda row, _: copy(row, 1), None)
