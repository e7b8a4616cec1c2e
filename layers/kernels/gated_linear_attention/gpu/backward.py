"""The Mosaic GPU kernels of `gated_linear_attention`, backward: a walk forwards in time for q, one backwards for k and v.

With S the state that enters a chunk, R the gradient of the state that leaves it, and the notation of `chunked`,

    dP = do v^T,    dq = b do S^T + (dP d scale) k,    R of the chunk before = a R + q^T (b do),
    dk = w v R^T + (dP d scale)^T q,    dv = w k R + P^T do.

`query_gradients` recomputes S from the states that the forward pass kept; each warpgroup holds 64 keys and all values.
`key_value_gradients` carries R, 64 keys per warpgroup; one warpgroup computes dv and the other dk.

Every log-decay collects the terms of the pairs of steps on either side of it. The terms of dq . q are what a step reads,
those of dk . k what it writes. For step t the gradient is therefore the sum of dq . q - dk . k from t to the end of its
chunk, plus the flow S' . R through the end of the chunk. In the sum, pairs on one side cancel, because both terms come from
the same rounded factors. The flow is known at the ends of spans. From there, what each chunk wrote is subtracted and what it
read is added. These are products of the very numbers that S and R are sums of, so a large flow leaves no error where little
passes.
"""

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
    decays,
    shared_head,
    together,
)
from layers.kernels.mosaic_gpu import in_registers, launch, matrices, pl, plgpu, product


def query_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    gates: Gates,
    states: jax.Array,
    scale: float,
    span: int,
    length: int,
    settings: Settings,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns dq (b, t, h, k), in the type of q, sums (b, h, parts of keys, n, 2, c) and ends (b, h, s, k, v), float32.

    The sums are dq . q, and S . q^T (b do) per key. The ends are the states at the ends of spans.

    Args:
      states: (b, h, pieces or more, k, v), float32; those at the start of every piece come first.
      span: chunks between ends. If there are several pieces, they are whole spans.
    """
    batch, time, _, keys = q.shape
    heads, width = gates.rows.shape[1], v.shape[3]
    count, stages = keys // PART, settings.stages
    walk = Walk(gates.chunks, length, stages)
    scratch = {
        "q_tiles": matrices((count, stages, CHUNK, PART), q.dtype),
        "k_tiles": matrices((count, stages, CHUNK, PART), k.dtype),
        "v_tiles": matrices((stages, CHUNK, width), v.dtype),
        "do_tiles": matrices((stages, CHUNK, width), do.dtype),
        "row_tiles": plgpu.SMEM((stages, *gates.rows.shape[3:]), jnp.float32),
        "column_tiles": plgpu.SMEM((stages, *gates.columns.shape[3:]), jnp.float32),
        "state_tile": matrices((count, PART, width), v.dtype),
        "written_tile": matrices((count, CHUNK, PART), k.dtype),
        "read_tile": matrices((count, CHUNK, PART), q.dtype),
        "dq_tile": matrices((count, CHUNK, PART), q.dtype),
        "full": plgpu.Barrier(num_arrivals=4 + 2 * count, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=count, num_barriers=stages),
        "finished": plgpu.Barrier(num_arrivals=count),
    }

    def body(*, q, k, v, do, rows, columns, states, dq, sums, ends, **tiles):
        me, row, piece = (
            jax.lax.axis_index("warpgroup"),
            jax.lax.axis_index("row"),
            jax.lax.axis_index("piece"),
        )
        head, lanes = jax.lax.axis_index("head"), pl.ds(me * PART, PART)
        q_tiles, k_tiles = tiles["q_tiles"].at[me], tiles["k_tiles"].at[me]
        v_tiles, do_tiles = tiles["v_tiles"], tiles["do_tiles"]
        row_tiles, column_tiles = tiles["row_tiles"], tiles["column_tiles"]
        state_tile, written_tile, read_tile, dq_tile = (
            tiles[f"{name}_tile"].at[me] for name in ("state", "written", "read", "dq")
        )
        full, free = tiles["full"], tiles["free"]

        def fetch(chunk, slot):
            steps, barrier = pl.ds(chunk * CHUNK, CHUNK), full.at[slot]
            for source, target in ((q, q_tiles), (k, k_tiles)):
                at = shared_head(head, heads, source.shape[2])
                plgpu.copy_gmem_to_smem(source.at[row, steps, at, lanes], target.at[slot], barrier)

            @pl.when(me == 0)
            def _():
                for source, target in ((v, v_tiles), (do, do_tiles)):
                    at = shared_head(head, heads, source.shape[2])
                    plgpu.copy_gmem_to_smem(source.at[row, steps, at], target.at[slot], barrier)
                for source, target in ((rows, row_tiles), (columns, column_tiles)):
                    plgpu.copy_gmem_to_smem(source.at[row, head, chunk], target.at[slot], barrier)

        def step(chunk, slot, refill, state):
            plgpu.barrier_wait(full.at[slot])
            factors, keys = row_tiles.at[slot], in_registers(k_tiles.at[slot]).astype(jnp.float32)
            queries = in_registers(q_tiles.at[slot]).astype(jnp.float32)
            state_tile[...] = state.astype(v.dtype)
            written_tile[...] = (keys * by_rows(factors.at[WRITE], PART)).astype(k.dtype)
            read_tile[...] = (queries * by_rows(factors.at[READ], PART)).astype(q.dtype)
            plgpu.commit_smem()
            sums[row, head, me, chunk, 1] = (state * product(read_tile.T, do_tiles.at[slot])).sum(axis=1)
            state = product(written_tile.T, v_tiles.at[slot], state * row_tiles[slot, KEEP, 0])
            last = jnp.logical_or(jax.lax.rem(chunk + 1, span) == 0, chunk == walk.chunks - 1)

            @pl.when(last)
            def _():
                ends[row, head, jax.lax.div(chunk, span), lanes] = state

            scores = product(do_tiles.at[slot], v_tiles.at[slot].T)
            scores = scale * scores * decays(factors, column_tiles.at[slot])
            gradient = product(do_tiles.at[slot], state_tile.T) * by_rows(factors.at[READ], PART)
            gradient = product(scores.astype(k.dtype), k_tiles.at[slot], gradient)
            queries = in_registers(q_tiles.at[slot]).astype(jnp.float32)
            sums[row, head, me, chunk, 0] = (gradient * queries).sum(axis=1)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            dq_tile[...] = gradient.astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(dq_tile, dq.at[row, pl.ds(chunk * CHUNK, CHUNK), head, lanes])
            if count > 1:
                plgpu.barrier_arrive(free.at[slot])
                pl.when(me == 0)(lambda: plgpu.barrier_wait(free.at[slot]))
            refill()
            return state

        state = 1.0 * in_registers(states.at[row, head, piece, lanes])
        walk.run(fetch, step, state)
        plgpu.wait_smem_to_gmem(0)
        together(tiles["finished"])

    sums = batch, heads, count, gates.chunks, 2, CHUNK
    ends = batch, heads, pl.cdiv(gates.chunks, span), keys, width
    results = launch(
        body,
        name="gated_linear_attention_queries",
        grid={"row": batch, "piece": walk.pieces, "head": heads},
        inputs={"q": q, "k": k, "v": v, "do": do, **gates._asdict(), "states": states},
        outputs={
            "dq": jax.ShapeDtypeStruct((batch, time, heads, keys), q.dtype),
            "sums": jax.ShapeDtypeStruct(sums, jnp.float32),
            "ends": jax.ShapeDtypeStruct(ends, jnp.float32),
        },
        scratch=scratch,
        warpgroups=count,
    )
    return results["dq"], results["sums"], results["ends"]


def key_value_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    gates: Gates,
    ends: jax.Array,
    dleaving: jax.Array,
    scale: float,
    span: int,
    length: int,
    settings: Settings,
) -> tuple[jax.Array, ...]:
    """Returns dk (b, t, h, k), dv (b, t, h, v), sums, written, flows (b, h, s, k) and the gradient of the first state.

    The sums, (b, h, n, 2, c), are dk . k and its part that comes from R; `written`, (b, h, n, k), is R . k^T (w v) per key,
    `flows` the flow through the ends of spans.

    Stages per chunk, with warpgroup 0 on the left and 1 on the right:

        load      q, k, v, do, gates to shared memory, `stages` chunks ahead
        flow      at the end of a span: S . R of the own keys
        state     w k, R . (w k)^T v; then b q and R, rounded, to shared memory (own keys)
        ready     ------------------------------------------------------------------------
        scores    P^T = scale (k q^T) d^T          |    dP^T = scale (v do^T) d^T
        products  dv = w k R + P^T do              |    dk = w v R^T + dP^T q
        sums                                       |    dk . k, and its part from R
        store     dv                               |    dk
        carry     R = a R + (b q)^T do (own keys)
        done      ------------------------------------------------------------------------

    Args:
      ends, span: as for `query_gradients`.
      dleaving: (b, pieces, h, k, v), float32: the gradient of the state at the end of every piece.
    """
    batch, time, _, keys = q.shape
    heads, width = gates.rows.shape[1], v.shape[3]
    parts, stages, spans = keys // PART, settings.stages, ends.shape[2]
    walk = Walk(gates.chunks, length, stages, reverse=True)
    scratch = {
        "q_tiles": tuple(matrices((stages, CHUNK, PART), q.dtype) for _ in range(parts)),
        "k_tiles": tuple(matrices((stages, CHUNK, PART), k.dtype) for _ in range(parts)),
        "v_tiles": matrices((stages, CHUNK, width), v.dtype),
        "do_tiles": matrices((stages, CHUNK, width), do.dtype),
        "row_tiles": plgpu.SMEM((stages, *gates.rows.shape[3:]), jnp.float32),
        "column_tiles": plgpu.SMEM((stages, *gates.columns.shape[3:]), jnp.float32),
        "leaving_tile": tuple(matrices((PART, width), v.dtype) for _ in range(parts)),
        "read_tile": tuple(matrices((CHUNK, PART), q.dtype) for _ in range(parts)),
        "dk_tile": tuple(matrices((CHUNK, PART), k.dtype) for _ in range(parts)),
        "dv_tile": matrices((CHUNK, width), v.dtype),
        "full": plgpu.Barrier(num_arrivals=4 + 2 * parts, num_barriers=stages),
        "ready": plgpu.Barrier(num_arrivals=2),
        "done": plgpu.Barrier(num_arrivals=2),
    }

    def body(*, q, k, v, do, rows, columns, ends, dleaving, dk, dv, sums, written, flows, dentering, **tiles):
        q_tiles, k_tiles, v_tiles, do_tiles = (tiles[f"{name}_tiles"] for name in ("q", "k", "v", "do"))
        row_tiles, column_tiles = tiles["row_tiles"], tiles["column_tiles"]
        leaving_tile, read_tile = tiles["leaving_tile"], tiles["read_tile"]
        full, ready, done = tiles["full"], tiles["ready"], tiles["done"]
        row, piece, head = (jax.lax.axis_index(name) for name in ("row", "piece", "head"))

        def fetch(chunk, slot):
            steps, barrier = pl.ds(chunk * CHUNK, CHUNK), full.at[slot]
            for source, target in ((q, q_tiles), (k, k_tiles)):
                at = shared_head(head, heads, source.shape[2])
                for part in range(parts):
                    columns_ = pl.ds(part * PART, PART)
                    tile = target[part].at[slot]
                    plgpu.copy_gmem_to_smem(source.at[row, steps, at, columns_], tile, barrier)
            for source, target in ((v, v_tiles), (do, do_tiles)):
                at = shared_head(head, heads, source.shape[2])
                plgpu.copy_gmem_to_smem(source.at[row, steps, at], target.at[slot], barrier)
            for source, target in ((rows, row_tiles), (columns, column_tiles)):
                plgpu.copy_gmem_to_smem(source.at[row, head, chunk], target.at[slot], barrier)

        def of_values(chunk, slot):
            """dv, by warpgroup 0."""
            factors = row_tiles.at[slot]
            weights = None
            for part in range(parts):
                weights = product(k_tiles[part].at[slot], q_tiles[part].at[slot].T, weights)
            weights = scale * weights * decays(factors, column_tiles.at[slot], transposed=True)
            gradient = None
            for part in range(parts):
                gradient = product(k_tiles[part].at[slot], leaving_tile[part], gradient)
            gradient = gradient * by_rows(factors.at[WRITE], width)
            gradient = product(weights.astype(do.dtype), do_tiles.at[slot], gradient)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            tiles["dv_tile"][...] = gradient.astype(v.dtype)
            plgpu.commit_smem()
            target = dv.at[row, pl.ds(chunk * CHUNK, CHUNK), head]
            plgpu.copy_smem_to_gmem(tiles["dv_tile"], target)

        def of_keys(chunk, slot):
            """dk, by warpgroup 1."""
            factors, dk_tile = row_tiles.at[slot], tiles["dk_tile"]
            scores = product(v_tiles.at[slot], do_tiles.at[slot].T)
            scores = scale * scores * decays(factors, column_tiles.at[slot], transposed=True)
            scores = scores.astype(q.dtype)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            inside, passed = 0.0, 0.0
            for part in range(parts):
                gradient = product(v_tiles.at[slot], leaving_tile[part].T)
                gradient = gradient * by_rows(factors.at[WRITE], PART)
                keys = in_registers(k_tiles[part].at[slot]).astype(jnp.float32)
                passed = passed + (gradient * keys).sum(axis=1)
                # Starting the product with the gradient would change the gradient's sum with the keys; see `product`.
                scored = product(scores, q_tiles[part].at[slot])
                inside = inside + (scored * keys).sum(axis=1)
                dk_tile[part][...] = (gradient + scored).astype(k.dtype)
            sums[row, head, chunk, 0] = inside + passed
            sums[row, head, chunk, 1] = passed
            plgpu.commit_smem()
            steps = pl.ds(chunk * CHUNK, CHUNK)
            for part in range(parts):
                lanes = pl.ds(part * PART, PART)
                plgpu.copy_smem_to_gmem(dk_tile[part], dk.at[row, steps, head, lanes])

        def walk_as(me):
            """The walk of warpgroup `me`, which carries the gradients of the states of the keys of part `me`, if any."""
            lanes = pl.ds(me * PART, PART)
            mine = me < parts

            def flow(place, leaving):
                state = in_registers(ends.at[row, head, place, lanes])
                flows[row, head, place, lanes] = (state * leaving).sum(axis=1)

            def step(chunk, slot, refill, leaving):
                if mine:
                    last = jnp.logical_or(jax.lax.rem(chunk + 1, span) == 0, chunk == walk.chunks - 1)
                    pl.when(last)(lambda: flow(jax.lax.div(chunk, span), leaving))
                plgpu.barrier_wait(full.at[slot])
                if mine:
                    keys = in_registers(k_tiles[me].at[slot]).astype(jnp.float32)
                    wrote = keys * by_rows(row_tiles.at[slot, WRITE], PART)
                    read_tile[me][...] = wrote.astype(k.dtype)
                    plgpu.commit_smem()
                    added = product(read_tile[me].T, v_tiles.at[slot])
                    written[row, head, chunk, lanes] = (added * leaving).sum(axis=1)
                    plgpu.commit_smem()
                    queries = in_registers(q_tiles[me].at[slot]).astype(jnp.float32)
                    read = queries * by_rows(row_tiles.at[slot, READ], PART)
                    read_tile[me][...] = read.astype(q.dtype)
                    leaving_tile[me][...] = leaving.astype(v.dtype)
                plgpu.commit_smem()
                together(ready)
                (of_keys if me else of_values)(chunk, slot)
                if mine:
                    keep = row_tiles[slot, KEEP, 0]
                    leaving = product(read_tile[me].T, do_tiles.at[slot], leaving * keep)
                plgpu.commit_smem()
                together(done)
                if me == 0:
                    refill()
                return leaving

            leaving = None
            if mine:
                leaving = 1.0 * in_registers(dleaving.at[row, piece, head, lanes])
            leaving = walk.run(fetch if me == 0 else lambda *_: None, step, leaving)
            if mine:

                @pl.when(piece == 0)
                def _():
                    dentering[row, head, lanes] = leaving

            plgpu.wait_smem_to_gmem(0)

        for me in range(2):
            pl.when(jax.lax.axis_index("warpgroup") == me)(lambda me=me: walk_as(me))

    def float32(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    results = launch(
        body,
        name="gated_linear_attention_keys_values",
        grid={"row": batch, "piece": walk.pieces, "head": heads},
        inputs={"q": q, "k": k, "v": v, "do": do, **gates._asdict(), "ends": ends, "dleaving": dleaving},
        outputs={
            "dk": jax.ShapeDtypeStruct((batch, time, heads, keys), k.dtype),
            "dv": jax.ShapeDtypeStruct((batch, time, heads, width), v.dtype),
            "sums": float32(batch, heads, gates.chunks, 2, CHUNK),
            "written": float32(batch, heads, gates.chunks, keys),
            "flows": float32(batch, heads, spans, keys),
            "dentering": float32(batch, heads, keys, width),
        },
        scratch=scratch,
        warpgroups=2,
    )
    return tuple(results[name] for name in ("dk", "dv", "sums", "written", "flows", "dentering"))
