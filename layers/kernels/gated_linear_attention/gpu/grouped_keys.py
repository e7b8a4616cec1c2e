"""Mosaic GPU kernel of `gated_linear_attention` for heads that share queries and keys, backward: the walk for k and v.

With the notation of backward.py and grouped_queries.py,

    dk = sum of (w v) R^T + scale (sum of dP d)^T q,    dk . k of a head = (w k R) . v + (dP d)^T . A^T,

with sums over the heads of a program. Warpgroup `me` holds 64 keys of all heads' states, and the pairs of steps and dv of
one head.
"""

import jax
import jax.numpy as jnp

from layers.kernels.gated_linear_attention.gpu.grouped import WARPGROUPS, decay, weights
from layers.kernels.gated_linear_attention.gpu.grouped_queries import HEADS, pair
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


def key_value_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    gates: Gates,
    scored: jax.Array,
    ends: jax.Array,
    dleaving: jax.Array,
    scale: float,
    span: int,
    length: int,
    settings: Settings,
) -> tuple[jax.Array, ...]:
    """Returns what `gpu_backward.key_value_gradients` does, from `scores` of k and q; dk is (b, t, blocks, k).

    Stages per chunk, the same for both warpgroups; each holds R of its 64 keys for both heads:

        flow      at the end of a span: S . R
        load      q, k of the own keys; v, do, gates of the own head; scores of the group
        scores    v do^T of the own head, times decay: its gradients of scores and the terms of its decay
                  R rounded to shared memory
        ready     ------------------------------------------------------------------------------------------
        products  dv = w k R + P^T do of the own head; w v and b do replace v and do in shared memory
        prepared  ------------------------------------------------------------------------------------------
        carry     R = a R + q^T (b do) and R . k^T (w v), for both heads
        products  dk = sum over both heads of (w v) R^T + dP^T q, for the own keys
        done      ------------------------------------------------------------------------------------------
        store     dv of the own head, dk of the own keys
    """
    batch, time, groups, keys = q.shape
    heads, width, stages, spans = v.shape[2], v.shape[3], settings.stages, ends.shape[2]
    walk = Walk(gates.chunks, length, stages, reverse=True)
    scratch = {
        "q_tiles": matrices((WARPGROUPS, stages, CHUNK, PART), q.dtype),
        "k_tiles": matrices((WARPGROUPS, stages, CHUNK, PART), k.dtype),
        "score_tiles": matrices((stages, CHUNK, CHUNK), jnp.float32),
        "v_tiles": matrices((HEADS, stages, CHUNK, PART), v.dtype),  # afterwards w v
        "do_tiles": matrices((HEADS, stages, CHUNK, PART), do.dtype),  # afterwards b do
        "row_tiles": plgpu.SMEM((HEADS, stages, *gates.rows.shape[3:]), jnp.float32),
        "column_tiles": plgpu.SMEM((HEADS, stages, *gates.columns.shape[3:]), jnp.float32),
        "leaving_tile": matrices((HEADS, WARPGROUPS, PART, PART), v.dtype),  # (me, me) afterwards dv
        "pair_tile": matrices((HEADS, CHUNK, CHUNK), q.dtype),  # afterwards dk
        "full": plgpu.Barrier(num_arrivals=1 + 2 * WARPGROUPS + 4 * HEADS, num_barriers=stages),
        "ready": plgpu.Barrier(num_arrivals=WARPGROUPS),
        "prepared": plgpu.Barrier(num_arrivals=WARPGROUPS),
        "done": plgpu.Barrier(num_arrivals=WARPGROUPS),
    }

    names = "dk", "dv", "sums", "written", "flows", "dentering"

    def body(*, q, k, v, do, rows, columns, scored, ends, dleaving, **refs):
        dk, dv, sums, written, flows, dentering = (refs[name] for name in names)
        me, row, piece, block = (jax.lax.axis_index(name) for name in ("warpgroup", "row", "piece", "block"))
        group, lanes = shared_head(block * HEADS, heads, groups), pl.ds(me * PART, PART)
        order, head = (me, 1 - me), block * HEADS + me  # the heads of the program, its own first
        q_tiles, k_tiles, v_tiles, do_tiles = (refs[f"{name}_tiles"] for name in ("q", "k", "v", "do"))
        row_tiles, column_tiles, score_tiles = (refs[f"{name}_tiles"] for name in ("row", "column", "score"))
        leaving_tile, pair_tile = refs["leaving_tile"], refs["pair_tile"]
        full, ready, prepared, done = (refs[name] for name in ("full", "ready", "prepared", "done"))

        def fetch(chunk, slot):
            steps, barrier = pl.ds(chunk * CHUNK, CHUNK), full.at[slot]
            for source, target in ((q, q_tiles), (k, k_tiles)):
                plgpu.copy_gmem_to_smem(source.at[row, steps, group, lanes], target.at[me, slot], barrier)
            for source, target in ((v, v_tiles), (do, do_tiles)):
                plgpu.copy_gmem_to_smem(source.at[row, steps, head], target.at[me, slot], barrier)
            for source, target in ((rows, row_tiles), (columns, column_tiles)):
                plgpu.copy_gmem_to_smem(source.at[row, head, chunk], target.at[me, slot], barrier)

            @pl.when(me == 0)
            def _():
                plgpu.copy_gmem_to_smem(scored.at[row, group, chunk], score_tiles.at[slot], barrier)

        def pairs(slot, carried):
            """dv of the own head, and the terms of its decay, in all and from R.

            Leaves R, the gradients of scores, w v and b do in shared memory.
            """
            factors, own_v, own_do = row_tiles.at[me, slot], v_tiles.at[me, slot], do_tiles.at[me, slot]
            scores, decayed = products(
                ([(own_v, own_do.T)],),
                meanwhile=lambda: decay(factors, column_tiles.at[me, slot], transposed=True),
            )
            kept = in_registers(score_tiles.at[slot])
            terms, gradients = pair(kept, scores, decayed, scale)
            weighed, inside = weights(kept, decayed).astype(do.dtype), terms.sum(axis=1)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.commit_smem()
            pair_tile.at[me][...] = gradients.astype(q.dtype)
            for at, leaving in zip(order, carried, strict=True):
                leaving_tile.at[at, me][...] = leaving.astype(v.dtype)
            plgpu.commit_smem()
            together(ready)

            def beside():
                wrote = in_registers(own_v).astype(jnp.float32) * by_rows(factors.at[WRITE], PART)
                read = in_registers(own_do).astype(jnp.float32) * by_rows(factors.at[READ], PART)
                return wrote.astype(v.dtype), read.astype(do.dtype)

            both = [(k_tiles.at[part, slot], leaving_tile.at[me, part]) for part in order]
            passed, (wrote, read) = products((both,), meanwhile=beside)
            through = (passed * wrote.astype(jnp.float32)).sum(axis=1)
            passed = passed * by_rows(factors.at[WRITE], PART)
            values, _ = products(([(weighed, own_do)], passed))
            plgpu.commit_smem()
            own_v[...], own_do[...] = wrote, read
            plgpu.commit_smem()
            together(prepared)
            return values.astype(v.dtype), inside + through, through

        def flow(place, carried):
            for at, leaving in zip(order, carried, strict=True):
                state = in_registers(ends.at[row, block * HEADS + at, place, lanes])
                flows[row, block * HEADS + at, place, lanes] = (state * leaving).sum(axis=1)

        def step(chunk, slot, refill, carried):
            last = jnp.logical_or(jax.lax.rem(chunk + 1, span) == 0, chunk == walk.chunks - 1)
            pl.when(last)(lambda: flow(jax.lax.div(chunk, span), carried))
            plgpu.barrier_wait(full.at[slot])
            values, terms, through = pairs(slot, carried)
            sums[row, head, chunk, 0] = terms
            sums[row, head, chunk, 1] = through
            own, other = carried

            def update(at, leaving):
                """The product that is multiplied with R, and the product that makes the next R."""
                keep = row_tiles[at, slot, KEEP, 0]
                return (
                    ([(k_tiles.at[me, slot].T, v_tiles.at[at, slot])],),
                    ([(q_tiles.at[me, slot].T, do_tiles.at[at, slot])], leaving * keep),
                )

            def note(at, leaving, added):
                written[row, block * HEADS + at, chunk, lanes] = (added * leaving).sum(axis=1)

            added, next_own, _ = products(*update(order[0], own))
            more, next_other, _ = products(
                *update(order[1], other), meanwhile=lambda: note(order[0], own, added)
            )
            both = [(v_tiles.at[at, slot], leaving_tile.at[at, me].T) for at in order]
            both += [(pair_tile.at[at], q_tiles.at[me, slot]) for at in order]
            gradient, _ = products((both,), meanwhile=lambda: note(order[1], other, more))
            plgpu.commit_smem()
            together(done)
            refill()
            leaving_tile.at[me, me][...] = values
            pair_tile.at[me][...] = gradient.astype(k.dtype)
            plgpu.commit_smem()
            steps = pl.ds(chunk * CHUNK, CHUNK)
            plgpu.copy_smem_to_gmem(leaving_tile.at[me, me], dv.at[row, steps, head])
            plgpu.copy_smem_to_gmem(pair_tile.at[me], dk.at[row, steps, block, lanes])
            return next_own, next_other

        start = tuple(1.0 * in_registers(dleaving.at[row, piece, block * HEADS + at, lanes]) for at in order)
        carried = walk.run(fetch, step, start)

        @pl.when(piece == 0)
        def _():
            for at, leaving in zip(order, carried, strict=True):
                dentering[row, block * HEADS + at, lanes] = leaving

        plgpu.wait_smem_to_gmem(0)

    def float32(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    results = launch(
        body,
        name="gated_linear_attention_grouped_keys_values",
        grid={"row": batch, "piece": walk.pieces, "block": heads // HEADS},
        inputs={
            "q": q,
            "k": k,
            "v": v,
            "do": do,
            **gates._asdict(),
            "scored": scored,
            "ends": ends,
            "dleaving": dleaving,
        },
        outputs={
            "dk": jax.ShapeDtypeStruct((batch, time, heads // HEADS, keys), k.dtype),
            "dv": jax.ShapeDtypeStruct((batch, time, heads, width), v.dtype),
            "sums": float32(batch, heads, gates.chunks, 2, CHUNK),
            "written": float32(batch, heads, gates.chunks, keys),
            "flows": float32(batch, heads, spans, keys),
            "dentering": float32(batch, heads, keys, width),
        },
        scratch=scratch,
        warpgroups=WARPGROUPS,
    )
    return tuple(results[name] for name in names)
