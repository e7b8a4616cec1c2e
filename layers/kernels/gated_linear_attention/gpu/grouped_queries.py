"""Mosaic GPU kernel of `gated_linear_attention` for heads that share queries and keys, backward: the walk for q.

With the notation of backward.py, and the scores A = scale q k^T of pairs that see each other,

    dq = sum of (b do) S^T + scale (sum of dP d) k,    dq . q of a head = ((b do) S^T) . q + (dP d) . A,

with sums over the heads of a program, so that the gradient leaves the kernel once per program instead of once per head.
Warpgroup `me` holds 64 keys of all heads' states, and the pairs of steps of one head.
"""

from typing import Any

import jax
import jax.numpy as jnp

from layers.kernels.gated_linear_attention.gpu.grouped import UNSEEN, WARPGROUPS, decay
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
from layers.kernels.mosaic_gpu import in_registers, launch, matrices, pl, plgpu, products

HEADS = WARPGROUPS  # per program: each warpgroup has the pairs of one head
KEYS = WARPGROUPS * PART  # per head: each warpgroup has the states of half of them


def pair(scored: Any, scores: jax.Array, decayed: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
    """Returns the terms of the gradients of decay, and those of the gradients of scores, per pair of steps.

    Args:
      scored: `scores` of the chunk.
      scores, decayed: dP and d, for all pairs.
    """
    gradients = scores * decayed
    seen = scored != UNSEEN
    return jnp.where(seen, gradients * scored, 0.0), jnp.where(seen, scale * gradients, 0.0)


def query_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    gates: Gates,
    scored: jax.Array,
    states: jax.Array,
    scale: float,
    span: int,
    length: int,
    settings: Settings,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns what `gpu_backward.query_gradients` does, from `scores`; dq is (b, t, blocks, k).

    Stages per chunk, the same for both warpgroups; each holds S of its 64 keys for both heads:

        load      q, k of the own keys; v, do, gates of the own head; scores of the group
        scores    do v^T of the own head, times decay: its gradients of scores and the terms of its decay
                  w v and b do replace v and do in shared memory; S rounded to shared memory
        ready     --------------------------------------------------------------------------------------
        carry     S = a S + k^T (w v) and S . q^T (b do), for both heads
        products  dq = sum over both heads of (b do) S^T + dP k, for the own keys; dq . q per head
        ends      at the end of a span: S to device memory
        done      --------------------------------------------------------------------------------------
        store     dq of the own keys
    """
    batch, time, groups, keys = q.shape
    heads, width, stages = v.shape[2], v.shape[3], settings.stages
    walk = Walk(gates.chunks, length, stages)
    scratch = {
        "q_tiles": matrices((WARPGROUPS, stages, CHUNK, PART), q.dtype),
        "k_tiles": matrices((WARPGROUPS, stages, CHUNK, PART), k.dtype),
        "score_tiles": matrices((stages, CHUNK, CHUNK), jnp.float32),
        "v_tiles": matrices((HEADS, stages, CHUNK, PART), v.dtype),  # afterwards w v
        "do_tiles": matrices((HEADS, stages, CHUNK, PART), do.dtype),  # afterwards b do
        "row_tiles": plgpu.SMEM((HEADS, stages, *gates.rows.shape[3:]), jnp.float32),
        "column_tiles": plgpu.SMEM((HEADS, stages, *gates.columns.shape[3:]), jnp.float32),
        "own_tile": matrices((WARPGROUPS, PART, PART), v.dtype),
        "other_tile": matrices((WARPGROUPS, PART, PART), v.dtype),
        "pair_tile": matrices((HEADS, CHUNK, CHUNK), k.dtype),  # afterwards gradients
        "full": plgpu.Barrier(num_arrivals=1 + 2 * WARPGROUPS + 4 * HEADS, num_barriers=stages),
        "ready": plgpu.Barrier(num_arrivals=WARPGROUPS),
        "done": plgpu.Barrier(num_arrivals=WARPGROUPS),
    }

    def body(*, q, k, v, do, rows, columns, scored, states, dq, sums, ends, **tiles):
        me, row, piece, block = (jax.lax.axis_index(name) for name in ("warpgroup", "row", "piece", "block"))
        group, lanes = shared_head(block * HEADS, heads, groups), pl.ds(me * PART, PART)
        order = me, 1 - me  # the heads of the program, its own first
        q_tiles, k_tiles, own_tile, other_tile = (
            tiles[name].at[me] for name in ("q_tiles", "k_tiles", "own_tile", "other_tile")
        )
        v_tiles, do_tiles, pair_tile = tiles["v_tiles"], tiles["do_tiles"], tiles["pair_tile"]
        row_tiles, column_tiles, score_tiles = (tiles[f"{name}_tiles"] for name in ("row", "column", "score"))
        full, ready, done = tiles["full"], tiles["ready"], tiles["done"]

        def fetch(chunk, slot):
            steps, barrier, head = pl.ds(chunk * CHUNK, CHUNK), full.at[slot], block * HEADS + me
            for source, target in ((q, q_tiles), (k, k_tiles)):
                plgpu.copy_gmem_to_smem(source.at[row, steps, group, lanes], target.at[slot], barrier)
            for source, target in ((v, v_tiles), (do, do_tiles)):
                plgpu.copy_gmem_to_smem(source.at[row, steps, head], target.at[me, slot], barrier)
            for source, target in ((rows, row_tiles), (columns, column_tiles)):
                plgpu.copy_gmem_to_smem(source.at[row, head, chunk], target.at[me, slot], barrier)

            @pl.when(me == 0)
            def _():
                plgpu.copy_gmem_to_smem(scored.at[row, group, chunk], score_tiles.at[slot], barrier)

        def pairs(slot):
            """The terms of the own head's decay; leaves the gradients of its scores, w v and b do in shared memory."""
            factors, own_v, own_do = row_tiles.at[me, slot], v_tiles.at[me, slot], do_tiles.at[me, slot]

            def beside():
                written = in_registers(own_v).astype(jnp.float32) * by_rows(factors.at[WRITE], PART)
                read = in_registers(own_do).astype(jnp.float32) * by_rows(factors.at[READ], PART)
                decayed = decay(factors, column_tiles.at[me, slot])
                return written.astype(v.dtype), read.astype(do.dtype), decayed

            scores, (written, read, decayed) = products(([(own_do, own_v.T)],), meanwhile=beside)
            terms, gradients = pair(in_registers(score_tiles.at[slot]), scores, decayed, scale)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.commit_smem()
            own_v[...], own_do[...] = written, read
            pair_tile.at[me][...] = gradients.astype(k.dtype)
            return terms.sum(axis=1)

        def step(chunk, slot, refill, carried):
            plgpu.barrier_wait(full.at[slot])
            inside = pairs(slot)
            own, other = carried
            own_tile[...], other_tile[...] = own.astype(v.dtype), other.astype(v.dtype)
            plgpu.commit_smem()
            together(ready)

            def update(at, state):
                """The product that is multiplied with the state, and the product that makes the next state."""
                keep = row_tiles[at, slot, KEEP, 0]
                return (
                    ([(q_tiles.at[slot].T, do_tiles.at[at, slot])],),
                    ([(k_tiles.at[slot].T, v_tiles.at[at, slot])], state * keep),
                )

            def note(at, state, added):
                sums[row, block * HEADS + at, me, chunk, 1] = (state * added).sum(axis=1)

            added, next_own, _ = products(*update(order[0], own))
            more, next_other, _ = products(
                *update(order[1], other), meanwhile=lambda: note(order[0], own, added)
            )
            own_read, other_read, _ = products(
                ([(do_tiles.at[order[0], slot], own_tile.T)],),
                ([(do_tiles.at[order[1], slot], other_tile.T)],),
                meanwhile=lambda: note(order[1], other, more),
            )

            def reads():
                queries = in_registers(q_tiles.at[slot]).astype(jnp.float32)
                for at, read, also in ((order[0], own_read, inside), (order[1], other_read, 0.0)):
                    sums[row, block * HEADS + at, me, chunk, 0] = (read * queries).sum(axis=1) + also
                return own_read + other_read

            both = [(pair_tile.at[head], k_tiles.at[slot]) for head in order]
            gradient, read = products((both,), meanwhile=reads)
            gradient = gradient + read
            last = jnp.logical_or(jax.lax.rem(chunk + 1, span) == 0, chunk == walk.chunks - 1)

            @pl.when(last)
            def _():
                for at, state in zip(order, (next_own, next_other), strict=True):
                    ends[row, block * HEADS + at, jax.lax.div(chunk, span), lanes] = state

            plgpu.commit_smem()
            together(done)
            refill()
            pair_tile.at[me][...] = gradient.astype(q.dtype)
            plgpu.commit_smem()
            steps = pl.ds(chunk * CHUNK, CHUNK)
            plgpu.copy_smem_to_gmem(pair_tile.at[me], dq.at[row, steps, block, lanes])
            return next_own, next_other

        start = tuple(1.0 * in_registers(states.at[row, block * HEADS + at, piece, lanes]) for at in order)
        walk.run(fetch, step, start)
        plgpu.wait_smem_to_gmem(0)

    sums = batch, heads, WARPGROUPS, gates.chunks, 2, CHUNK
    ends = batch, heads, pl.cdiv(gates.chunks, span), keys, width
    results = launch(
        body,
        name="gated_linear_attention_grouped_queries",
        grid={"row": batch, "piece": walk.pieces, "block": heads // HEADS},
        inputs={"q": q, "k": k, "v": v, "do": do, **gates._asdict(), "scored": scored, "states": states},
        outputs={
            "dq": jax.ShapeDtypeStruct((batch, time, heads // HEADS, keys), q.dtype),
            "sums": jax.ShapeDtypeStruct(sums, jnp.float32),
            "ends": jax.ShapeDtypeStruct(ends, jnp.float32),
        },
        scratch=scratch,
        warpgroups=WARPGROUPS,
    )
    return results["dq"], results["sums"], results["ends"]
