"""The Mosaic GPU kernels of `gated_linear_attention`, forward: outputs, and the effect of a piece of time on the state.

With the notation of `chunked`, in chunks of 64 steps,

    o = b q S + P v,    P_ij = scale q_i k_j d_ij,    S' = a S + k^T (w v).

A program takes one row of the batch, one piece of the time axis and as many parts of heads as it has warpgroups. A warpgroup
walks through the chunks with its part of the state, all keys by 64 values, in float32 registers. Asynchronous copies bring
q, k and v into shared memory, up to `stages` chunks in flight. Two warpgroups share the queries and keys of their head or
group of heads, and hide each other's waits.

At 8 x 4096 tokens and 16 heads of 128 in bfloat16, the forward pass moves 0.54 GB, which take 0.18 ms at 3.0 TB/s, and does
0.06 TFLOP of matrix products, less than 0.1 ms at half the peak. Both passes move 2.0 GB. A program fills a multiprocessor
by its shared memory. Its two warpgroups execute about a thousand instructions per chunk, most of them in turn with their
products, and bound the kernel where memory does not.

Where rows and heads are too few to fill the GPU, time is cut into pieces. A first launch computes what each piece adds to
the state, and a short scan the states between pieces. The price is a second reading of the inputs, and the scan.

`Gates` holds the numbers per step that depend on decay and segments. The tail of the sequence needs no masks: copies into
shared memory fill with zeros beyond the ends of an array, and copies out write nothing there.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels.mosaic_gpu import (
    along,
    exp2,
    in_registers,
    indices,
    launch,
    matrices,
    pl,
    plgpu,
    product,
    spread,
)

CHUNK = 64
PART = 64  # values, or keys, of the state per warpgroup

_SQUARE = (CHUNK, CHUNK)


class Gates(NamedTuple):
    """The factors that decay and segments give to every step, float32.

    Attributes:
      rows: (b, h, n, 4 or 5, c): the sum of log-decay to base 2 from the start of the chunk, the factor with which the step
        reads the state, that with which it writes it, that of the state over the whole chunk, and the segment number.
      columns: (b, h, n, 1 or 2, c): the sum again, and the segment number; that of padding equals none in `rows`.
    """

    rows: jax.Array
    columns: jax.Array

    @property
    def chunks(self) -> int:
        return self.rows.shape[2]


READ, WRITE, KEEP = 1, 2, 3


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the kernels are laid out.

    Attributes:
      stages: chunks of inputs in shared memory, in flight or in use.
      pieces: number of pieces of the time axis; chosen by shape if None.
      pairs: whether programs take two heads of a group with the same queries and keys, where possible; see grouped.py.
    """

    stages: int = 2
    pieces: int | None = None
    pairs: bool = True


@dataclasses.dataclass(frozen=True)
class Walk:
    """A walk through the chunks in pieces of `length` chunks, from the last to the first if `reverse`."""

    chunks: int
    length: int
    stages: int
    reverse: bool = False

    @property
    def pieces(self) -> int:
        return pl.cdiv(self.chunks, self.length)

    def run(self, fetch: Any, step: Any, start: Any) -> Any:
        """Runs `step(chunk, slot, refill, carry)` in order; `refill` fetches into the slot once it is free."""
        first = jax.lax.axis_index("piece") * self.length
        count = self.length
        if self.chunks % self.length:
            count = jnp.minimum(self.length, self.chunks - first)

        def place(turn: Any) -> Any:
            return first + (count - 1 - turn if self.reverse else turn)

        for turn in range(min(self.stages, self.length)):
            pl.when(turn < count)(lambda turn=turn: fetch(place(turn), turn))

        def one(turn: Any, carry: Any) -> Any:
            slot = jax.lax.rem(turn, self.stages)

            def refill() -> None:
                pl.when(turn + self.stages < count)(lambda: fetch(place(turn + self.stages), slot))

            return step(place(turn), slot, refill, carry)

        return jax.lax.fori_loop(0, count, one, start)


def decays(rows: Any, columns: Any, transposed: bool = False) -> jax.Array:
    """d_ij of a chunk, or d_ji, from its gates in shared memory; 0 for pairs that do not see each other."""
    row, column = spread(along(rows.at[0], 0), 0, _SQUARE), spread(along(columns.at[0], 1), 1, _SQUARE)
    i, j = indices(_SQUARE, 0), indices(_SQUARE, 1)
    seen, sums = (j >= i, column - row) if transposed else (i >= j, row - column)
    if rows.shape[0] > KEEP + 1:
        number = spread(along(rows.at[KEEP + 1], 0), 0, _SQUARE)
        seen &= number == spread(along(columns.at[1], 1), 1, _SQUARE)
    return jnp.where(seen, exp2(jnp.where(seen, jnp.minimum(sums, 0.0), 0.0)), 0.0)


def by_rows(vector: Any, width: int) -> jax.Array:
    """A vector of one number per step, in shared memory, spread over a matrix with as many rows."""
    return spread(along(vector, 0), 0, (CHUNK, width))


def together(barrier: Any) -> None:
    """Waits for the other warpgroups of the program: one that ends while another multiplies can abort the kernel."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def warpgroups(*counts: int, parts: int) -> int:
    """Warpgroups per program: two if two neighbouring parts of heads share queries and keys, else one.

    Args:
      counts: heads per query head, heads per key head.
      parts: parts per head.
    """
    return 2 if all(count * parts % 2 == 0 for count in counts) else 1


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gates: Gates,
    entering: jax.Array,
    scale: float,
    span: int | None,
    length: int,
    settings: Settings,
) -> tuple[jax.Array, jax.Array]:
    """Returns outputs (b, t, h, v), in the type of v, and states (b, h, s + 1, k, v), float32.

    The states are those at the start of every span and the last; only the last without spans.

    Args:
      q, k, v: (b, t, heads, width), bfloat16, t a multiple of 8, widths of 64.
      entering: (b, pieces, h, k, v), float32: the state at the start of every piece.
      span: chunks between the states, or None.
      length: chunks per piece.
    """
    batch, time, _, keys = q.shape
    heads, width = gates.rows.shape[1], v.shape[3]
    parts = width // PART
    shares = [heads // x.shape[2] for x in (q, k)]
    count = warpgroups(*shares, parts=parts)
    walk = Walk(gates.chunks, length, settings.stages)
    spans = pl.cdiv(gates.chunks, span) if span else 0
    stages = settings.stages
    scratch = {
        "q_tiles": matrices((stages, CHUNK, keys), q.dtype),
        "k_tiles": matrices((stages, CHUNK, keys), k.dtype),
        "v_tiles": matrices((count, stages, CHUNK, PART), v.dtype),
        "row_tiles": plgpu.SMEM((count, stages, *gates.rows.shape[3:]), jnp.float32),
        "column_tiles": plgpu.SMEM((count, stages, *gates.columns.shape[3:]), jnp.float32),
        "state_tile": matrices((count, keys, PART), v.dtype),
        "written_tile": matrices((count, CHUNK, PART), v.dtype),
        "o_tile": matrices((count, CHUNK, PART), v.dtype),
        "full": plgpu.Barrier(num_arrivals=2 + 3 * count, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=count, num_barriers=stages),
        "finished": plgpu.Barrier(num_arrivals=count),
    }

    def body(*, q, k, v, rows, columns, entering, o, states, **tiles):
        me, row, piece = (jax.lax.axis_index(name) for name in ("warpgroup", "row", "piece"))
        part = jax.lax.axis_index("part") * count + me
        head, lanes = jax.lax.div(part, parts), pl.ds(jax.lax.rem(part, parts) * PART, PART)
        q_tiles, k_tiles = tiles["q_tiles"], tiles["k_tiles"]
        v_tiles, row_tiles, column_tiles = (tiles[f"{name}_tiles"].at[me] for name in ("v", "row", "column"))
        state_tile, written_tile, o_tile = (
            tiles[f"{name}_tile"].at[me] for name in ("state", "written", "o")
        )
        full, free = tiles["full"], tiles["free"]

        def fetch(chunk, slot):
            steps, barrier = pl.ds(chunk * CHUNK, CHUNK), full.at[slot]
            at = shared_head(head, heads, v.shape[2])
            plgpu.copy_gmem_to_smem(v.at[row, steps, at, lanes], v_tiles.at[slot], barrier)
            plgpu.copy_gmem_to_smem(rows.at[row, head, chunk], row_tiles.at[slot], barrier)
            plgpu.copy_gmem_to_smem(columns.at[row, head, chunk], column_tiles.at[slot], barrier)

            @pl.when(me == 0)
            def _():
                for source, target in ((q, q_tiles), (k, k_tiles)):
                    at = shared_head(head, heads, source.shape[2])
                    plgpu.copy_gmem_to_smem(source.at[row, steps, at], target.at[slot], barrier)

        def step(chunk, slot, refill, state):
            def keep():
                states[row, head, jax.lax.div(chunk, span), :, lanes] = state

            if span:
                pl.when(jax.lax.rem(chunk, span) == 0)(keep)
            plgpu.barrier_wait(full.at[slot])
            factors, values = row_tiles.at[slot], in_registers(v_tiles.at[slot]).astype(jnp.float32)
            state_tile[...] = state.astype(v.dtype)
            written_tile[...] = (values * by_rows(factors.at[WRITE], PART)).astype(v.dtype)
            plgpu.commit_smem()
            weights = product(q_tiles.at[slot], k_tiles.at[slot].T)
            weights = scale * weights * decays(factors, column_tiles.at[slot])
            outputs = product(q_tiles.at[slot], state_tile) * by_rows(factors.at[READ], PART)
            outputs = product(weights.astype(v.dtype), v_tiles.at[slot], outputs)
            state = product(k_tiles.at[slot].T, written_tile, state * row_tiles[slot, KEEP, 0])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            o_tile[...] = outputs.astype(v.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_tile, o.at[row, pl.ds(chunk * CHUNK, CHUNK), head, lanes])
            if count > 1:
                plgpu.barrier_arrive(free.at[slot])
                pl.when(me == 0)(lambda: plgpu.barrier_wait(free.at[slot]))
            refill()
            return state

        state = 1.0 * in_registers(entering.at[row, piece, head, :, lanes])
        state = walk.run(fetch, step, state)

        @pl.when(piece == walk.pieces - 1)
        def _():
            states[row, head, spans, :, lanes] = state

        plgpu.wait_smem_to_gmem(0)
        together(tiles["finished"])

    results = launch(
        body,
        name="gated_linear_attention",
        grid={"row": batch, "piece": walk.pieces, "part": heads * parts // count},
        inputs={"q": q, "k": k, "v": v, **gates._asdict(), "entering": entering},
        outputs={
            "o": jax.ShapeDtypeStruct((batch, time, heads, width), v.dtype),
            "states": jax.ShapeDtypeStruct((batch, heads, spans + 1, keys, width), jnp.float32),
        },
        scratch=scratch,
        warpgroups=count,
    )
    return results["o"], results["states"]


def effects(
    x: jax.Array, y: jax.Array, gates: Gates, factor: int, reverse: bool, length: int, settings: Settings
) -> jax.Array:
    """Returns what every piece adds to the state, (b, pieces, h, k, v): the sum of decayed x^T (f y), f a row of the gates.

    Args:
      x, y: (b, t, heads, width): keys and values; or queries and gradients of outputs, from the last step to the first.
    """
    batch, keys, width = x.shape[0], x.shape[3], y.shape[3]
    heads, parts, stages = gates.rows.shape[1], width // PART, settings.stages
    walk = Walk(gates.chunks, length, stages, reverse)
    scratch = {
        "x_tiles": matrices((stages, CHUNK, keys), x.dtype),
        "y_tiles": matrices((stages, CHUNK, PART), y.dtype),
        "row_tiles": plgpu.SMEM((stages, *gates.rows.shape[3:]), jnp.float32),
        "written_tile": matrices((CHUNK, PART), y.dtype),
        "full": plgpu.Barrier(num_arrivals=3, num_barriers=stages),
    }

    def body(*, x, y, rows, added, x_tiles, y_tiles, row_tiles, written_tile, full):
        row, piece, part = (jax.lax.axis_index(name) for name in ("row", "piece", "part"))
        head, lanes = jax.lax.div(part, parts), pl.ds(jax.lax.rem(part, parts) * PART, PART)

        def fetch(chunk, slot):
            steps, barrier = pl.ds(chunk * CHUNK, CHUNK), full.at[slot]
            x_head, y_head = (shared_head(head, heads, a.shape[2]) for a in (x, y))
            plgpu.copy_gmem_to_smem(x.at[row, steps, x_head], x_tiles.at[slot], barrier)
            plgpu.copy_gmem_to_smem(y.at[row, steps, y_head, lanes], y_tiles.at[slot], barrier)
            plgpu.copy_gmem_to_smem(rows.at[row, head, chunk], row_tiles.at[slot], barrier)

        def step(_, slot, refill, state):
            plgpu.barrier_wait(full.at[slot])
            values = in_registers(y_tiles.at[slot]).astype(jnp.float32)
            values = values * by_rows(row_tiles.at[slot, factor], PART)
            written_tile[...] = values.astype(y.dtype)
            plgpu.commit_smem()
            state = product(x_tiles.at[slot].T, written_tile, state * row_tiles[slot, KEEP, 0])
            plgpu.commit_smem()
            refill()
            return state

        state = plgpu.layout_cast(jnp.zeros((keys, PART), jnp.float32), plgpu.Layout.WGMMA)
        added[row, piece, head, :, lanes] = walk.run(fetch, step, state)

    return launch(
        body,
        name="gated_linear_attention_effects",
        grid={"row": batch, "piece": walk.pieces, "part": heads * parts},
        inputs={"x": x, "y": y, "rows": gates.rows},
        outputs={"added": jax.ShapeDtypeStruct((batch, walk.pieces, heads, keys, width), jnp.float32)},
        scratch=scratch,
    )["added"]


def shared_head(head: Any, heads: int, count: int) -> Any:
    """The index, among `count` heads, of the head that head `head` of `heads` uses."""
    return jax.lax.div(head, heads // count)
