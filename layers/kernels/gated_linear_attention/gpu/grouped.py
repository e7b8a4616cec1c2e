"""Mosaic GPU kernels of `gated_linear_attention` for heads that share queries and keys, forward; see kernels.py.

The scores q k^T of a chunk are the same for all heads of a group. XLA computes them once, scaled, with a mark where a step
does not see another, so that each head only applies its decay. A program takes two heads of a group, one per warpgroup, with
their states in registers. The products that read the state and those that write it run together, while the weights are
computed.

For Mamba-2's 64 heads of 64 that share 128 keys, at 8 x 4096 tokens in bfloat16, compiled for Hopper:

                                   forward   backward, q   backward, k and v
    GB through memory              0.6       1.0           1.3                 and 0.5 for the sums over programs
    products of 64 x 64 x 16       20        18            24                  per head, chunk and warpgroup
    instructions                   750       870           1020                per head, chunk and warpgroup

Spills (0.14 and 0.30 KB per lane in the two backward kernels) and one program per multiprocessor are
what most likely bounds the kernels.
"""

from typing import Any

import jax
import jax.numpy as jnp

from layers.kernels.gated_linear_attention.gpu.kernels import (
    CHUNK,
    KEEP,
    PART,
    READ,
    WRITE,
    Gates,
    Settings,
    Walk,
    by_rows,
    shared_head,
    together,
)
from layers.kernels.mosaic_gpu import (
    along,
    exp2,
    in_registers,
    launch,
    matrices,
    pl,
    plgpu,
    product,
    products,
    spread,
)

WARPGROUPS = 2
FEWEST = 8  # heads per group, so that the scores are few beside the values
# Stands for the score of a pair that does not see each other: a number that no score takes.
UNSEEN = 2.0**-120

_SQUARE = (CHUNK, CHUNK)


def in_pairs(q: Any, k: Any, v: Any, heads: int, settings: Settings) -> bool:
    """Whether programs take two heads of a group: not where groups are small or odd, or heads wide.

    Args:
      heads: number of heads of the states.
    """
    groups = q.shape[2]
    if k.shape[2] != groups or v.shape[2:] != (heads, PART) or heads < FEWEST * groups:
        return False
    return settings.pairs and heads // groups % WARPGROUPS == 0


def scores(q: jax.Array, k: jax.Array, number: jax.Array | None, scale: float) -> jax.Array:
    """Returns scale q_i k_j per chunk, (b, groups, n, c, c), float32, and `UNSEEN` where step i does not see step j.

    Args:
      q, k: (b, t, groups, width).
      number: (b, t), the segment number per step, or None.
    """
    time = q.shape[1]
    missing = -time % CHUNK
    q, k = (jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) for x in (q, k))
    q, k = (x.reshape(x.shape[0], -1, CHUNK, *x.shape[2:]) for x in (q, k))
    result = scale * jnp.einsum("bnigk,bnjgk->bgnij", q, k, preferred_element_type=jnp.float32)
    seen = jnp.ones((1, 1, 1, *_SQUARE), bool)
    if number is not None:
        number = jnp.pad(number, ((0, 0), (0, missing))).reshape(number.shape[0], 1, -1, CHUNK)
        seen = (number[..., None] == number[..., None, :]) & (number[..., None] > 0)
    seen = jnp.tril(seen)
    return jnp.where(seen, jnp.where(result == UNSEEN, 0.0, result), UNSEEN)


def weights(kept: jax.Array, decayed: jax.Array) -> jax.Array:
    """The scores times their decay, and zeros where they are `UNSEEN`."""
    return jnp.where(kept != UNSEEN, kept * decayed, 0.0)


def decay(rows: Any, columns: Any, transposed: bool = False) -> jax.Array:
    """d_ij of a chunk, or d_ji, from its gates in shared memory; at most 1 for pairs that do not see each other."""
    row, column = spread(along(rows.at[0], 0), 0, _SQUARE), spread(along(columns.at[0], 1), 1, _SQUARE)
    return exp2(jnp.minimum(column - row if transposed else row - column, 0.0))


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gates: Gates,
    scored: jax.Array,
    entering: jax.Array,
    span: int | None,
    length: int,
    settings: Settings,
) -> tuple[jax.Array, jax.Array]:
    """Returns what `gpu_kernels.forward` does, from `scores`, with one head per warpgroup of a program."""
    batch, time, groups, keys = q.shape
    heads, width, stages = gates.rows.shape[1], v.shape[3], settings.stages
    walk = Walk(gates.chunks, length, stages)
    spans = pl.cdiv(gates.chunks, span) if span else 0
    scratch = {
        "q_tiles": matrices((stages, CHUNK, keys), q.dtype),
        "k_tiles": matrices((stages, CHUNK, keys), k.dtype),
        "score_tiles": matrices((stages, *_SQUARE), jnp.float32),
        "v_tiles": matrices((WARPGROUPS, stages, CHUNK, PART), v.dtype),
        "row_tiles": plgpu.SMEM((WARPGROUPS, stages, *gates.rows.shape[3:]), jnp.float32),
        "column_tiles": plgpu.SMEM((WARPGROUPS, stages, *gates.columns.shape[3:]), jnp.float32),
        "state_tile": matrices((WARPGROUPS, keys, PART), v.dtype),
        "written_tile": matrices((WARPGROUPS, CHUNK, PART), v.dtype),  # afterwards outputs
        "full": plgpu.Barrier(num_arrivals=3 + 3 * WARPGROUPS, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        "finished": plgpu.Barrier(num_arrivals=WARPGROUPS),
    }

    def body(*, q, k, v, rows, columns, scored, entering, o, states, **tiles):
        me, row, piece = (jax.lax.axis_index(name) for name in ("warpgroup", "row", "piece"))
        head = jax.lax.axis_index("block") * WARPGROUPS + me
        group = shared_head(head, heads, groups)
        q_tiles, k_tiles, score_tiles = tiles["q_tiles"], tiles["k_tiles"], tiles["score_tiles"]
        v_tiles, row_tiles, column_tiles = (tiles[f"{name}_tiles"].at[me] for name in ("v", "row", "column"))
        state_tile, written_tile = (tiles[f"{name}_tile"].at[me] for name in ("state", "written"))
        full, free = tiles["full"], tiles["free"]

        def fetch(chunk, slot):
            steps, barrier = pl.ds(chunk * CHUNK, CHUNK), full.at[slot]
            plgpu.copy_gmem_to_smem(v.at[row, steps, head], v_tiles.at[slot], barrier)
            plgpu.copy_gmem_to_smem(rows.at[row, head, chunk], row_tiles.at[slot], barrier)
            plgpu.copy_gmem_to_smem(columns.at[row, head, chunk], column_tiles.at[slot], barrier)

            @pl.when(me == 0)
            def _():
                for source, target in ((q, q_tiles), (k, k_tiles)):
                    plgpu.copy_gmem_to_smem(source.at[row, steps, group], target.at[slot], barrier)
                plgpu.copy_gmem_to_smem(scored.at[row, group, chunk], score_tiles.at[slot], barrier)

        def step(chunk, slot, refill, state):
            if span:

                @pl.when(jax.lax.rem(chunk, span) == 0)
                def _():
                    states[row, head, jax.lax.div(chunk, span)] = state

            plgpu.barrier_wait(full.at[slot])
            factors = row_tiles.at[slot]
            values = in_registers(v_tiles.at[slot]).astype(jnp.float32)
            written = (values * by_rows(factors.at[WRITE], PART)).astype(v.dtype)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.commit_smem()
            state_tile[...] = state.astype(v.dtype)
            written_tile[...] = written
            plgpu.commit_smem()

            def weigh():
                kept = in_registers(score_tiles.at[slot])
                return weights(kept, decay(factors, column_tiles.at[slot])).astype(v.dtype)

            outputs, state, weighed = products(
                ([(q_tiles.at[slot], state_tile)],),
                ([(k_tiles.at[slot].T, written_tile)], state * row_tiles[slot, KEEP, 0]),
                meanwhile=weigh,
            )
            outputs = outputs * by_rows(factors.at[READ], PART)
            outputs = product(weighed, v_tiles.at[slot], outputs)
            plgpu.commit_smem()
            written_tile[...] = outputs.astype(v.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(written_tile, o.at[row, pl.ds(chunk * CHUNK, CHUNK), head])
            plgpu.barrier_arrive(free.at[slot])
            pl.when(me == 0)(lambda: plgpu.barrier_wait(free.at[slot]))
            refill()
            return state

        state = walk.run(fetch, step, 1.0 * in_registers(entering.at[row, piece, head]))

        @pl.when(piece == walk.pieces - 1)
        def _():
            states[row, head, spans] = state

        plgpu.wait_smem_to_gmem(0)
        together(tiles["finished"])

    results = launch(
        body,
        name="gated_linear_attention_grouped",
        grid={"row": batch, "piece": walk.pieces, "block": heads // WARPGROUPS},
        inputs={"q": q, "k": k, "v": v, **gates._asdict(), "scored": scored, "entering": entering},
        outputs={
            "o": jax.ShapeDtypeStruct((batch, time, heads, width), v.dtype),
            "states": jax.ShapeDtypeStruct((batch, heads, spans + 1, keys, width), jnp.float32),
        },
        scratch=scratch,
        warpgroups=WARPGROUPS,
    )
    return results["o"], results["states"]
