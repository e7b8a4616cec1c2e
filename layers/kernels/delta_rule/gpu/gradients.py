"""The Hopper kernel for the gradients of `delta_rule` that are local to chunks; letters as in backward.py.

    dP = do y^T,          dq = scale r do S^T + (scale dP o D) k,
    dG = dy (beta e)^T,   dT = dG o D,   dA = - T^T dT T^T for j < i,
    dk = w y dS'^T - r de S^T + (scale dP o D)^T q + (beta dA + (beta dA)^T) k,

where A is the matrix without decay. A sum of log-decay up to a token scales what its row of q and of e reads, and divides
what its row of k and of y writes. Its gradient is q.dq + k.(the second term of dk) - k.(the first and third term of dk),
plus the row sums less the column sums of dG o G, which is dT o T. Two warpgroups divide the products of a chunk.

At 8 x 4096 tokens, 16 heads of 128, bfloat16, this reads 1.4 GB and writes 0.27 GB, 0.56 ms at 3.0 TB/s; the products take
0.36 ms at 400 TFLOP/s. A chunk fills the shared memory of a multiprocessor. Copies of the next chunk start as soon as this
one no longer needs their place: for S, v, do and de before its last 10 of 34 products of 64 x 64 x 64 numbers, and for the
rest after them.
"""

import functools
import itertools

import jax
import jax.numpy as jnp

from layers.kernels.delta_rule.gpu.tiles import (
    BETA,
    BLOCK,
    CHUNK,
    DECAY,
    READ,
    SQUARE,
    WRITE,
    along_columns,
    along_rows,
    by_column,
    by_row,
    decay_matrix,
    fetch,
    in_turn,
    indices,
    read,
    send,
    sizes_of,
    visible,
)
from layers.kernels.mosaic_gpu import launch, matrices, pl, plgpu, product

# The inputs that `chunk_gradients` needs first.
FIRST = ("k", "v", "states", "inverse")


def chunk_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    vectors: jax.Array,
    made: dict[str, jax.Array],
    chained: dict[str, jax.Array],
    scale: float,
    turns: int,
) -> dict[str, jax.Array]:
    """Returns the gradients that are local to the chunks; each program takes some chunks in turn.

    Stages per chunk, with warpgroup 0 on the left and 1 on the right; the next chunk's copies start where noted:

        load      inverse T, k, v, S, vectors arrive first
        solve                                      |    G = T o D
        errors    e = v - r k S in place of v, beta e (each warpgroup 64 features)
        written   y = G beta e                     (each 64 features)
        load      q, do, de, dy, dS' arrive
        scores    scale dP o D; sums of S o dS'    |    dG, dT o T; beta dA in place of T
        products  dq; de S^T of dk                 (each 64 features)
        release   fetch S, v, do, de of the next chunk
        products  the other terms of dk            (each 64 features)
        store     dq, dk, sums of decays and beta
        release   fetch k, T, dS'; after the store, q and dy

    Args:
      made: `inverse`, which `prepare` returns, and `states`, which `forward` returns.
      chained: what `chain` returns.
      turns: chunks per program, at most.

    Returns:
      dq, dk: (b, t, h, k), bfloat16, per head of the values.
      dvectors: (b, h, chunks, rows, c), float32; see `part_rows`.
    """
    sizes = sizes_of(k, v)
    batch, time, heads, key_dim, value_dim = sizes
    sources = {
        "q": q,
        "k": k,
        "v": v,
        "do": do,
        "de": chained["dv"],
        "dy": chained["dy"],
        "states": made["states"],
        "dstates": chained["dstates"],
        "inverse": made["inverse"],
    }
    shapes = {
        **dict.fromkeys(("q", "k"), (CHUNK, key_dim)),
        **dict.fromkeys(("v", "do", "de", "dy"), (CHUNK, value_dim)),
        **dict.fromkeys(("states", "dstates"), (value_dim, key_dim)),
        "inverse": SQUARE,
    }
    keys = jax.ShapeDtypeStruct((batch, time, heads, key_dim), jnp.bfloat16)
    kinds = part_rows(key_dim)
    parts = max(rows.stop for rows in kinds.values())
    outputs = {
        "dq": keys,
        "dk": keys,
        "dvectors": jax.ShapeDtypeStruct((batch, heads, sizes.chunks, parts, CHUNK), jnp.float32),
    }
    shapes |= {"y": (CHUNK, value_dim), "score": SQUARE, "solve": SQUARE}
    if key_dim != value_dim:
        shapes["dq"] = (CHUNK, key_dim)
    scratch = {f"{name}_tile": matrices((1, *shape), jnp.bfloat16) for name, shape in shapes.items()} | {
        "vector_tile": plgpu.SMEM((2, vectors.shape[-2], CHUNK), jnp.float32),
        "part_tile": plgpu.SMEM((parts, CHUNK), jnp.float32),
        "arrived": plgpu.Barrier(num_arrivals=len(FIRST) + 2),  # with two copies of the vectors
        "arrived_later": plgpu.Barrier(num_arrivals=len(sources) - len(FIRST)),
        "met": plgpu.Barrier(num_arrivals=2),
    }

    spans = pl.cdiv(sizes.chunks, in_turn(batch * heads * sizes.chunks, turns))
    length = pl.cdiv(sizes.chunks, spans)

    def body(*, vectors, dq, dk, dvectors, vector_tile, part_tile, met, **refs):
        row, head, span = (jax.lax.axis_index(name) for name in ("row", "head", "span"))
        here = jax.lax.axis_index("warpgroup")
        shared, own = (sizes.shared(head, count) for count in (q.shape[2], vectors.shape[1]))
        ends = jnp.minimum((span + 1) * length, sizes.chunks)
        tiles = {name: refs[f"{name}_tile"] for name in shapes}

        def place(name, chunk):
            tokens = pl.ds(chunk * CHUNK, CHUNK)
            if name in ("q", "k"):
                return row, tokens, shared
            if name in ("states", "dstates"):
                return row, head, chunk
            return (row, own, tokens) if name == "inverse" else (row, tokens, head)

        def bring(chunk, *names):
            for name in names:
                barrier = refs["arrived" if name in FIRST else "arrived_later"]
                fetch([(refs[name].at[*place(name, chunk)], tiles[name].at[0])], barrier)
            if "inverse" in names:
                numbers = vectors.at[row, own, chunk]
                fetch([(numbers, vector_tile.at[i]) for i in range(2)], refs["arrived"])

        def meet():
            """Waits until both warpgroups have written and read what they had to."""
            plgpu.commit_smem()
            plgpu.barrier_arrive(met)
            plgpu.barrier_wait(met)

        def shares(width, work):
            """Each warpgroup runs `work(number, columns)` for its block of the columns, if there are enough."""
            for i in range(width // BLOCK):
                pl.when(here == i)(functools.partial(work, i, pl.ds(i * BLOCK, BLOCK)))

        def rounded(x):
            return x.astype(jnp.bfloat16)

        def row_sum(x, y):
            return (x * y).sum(axis=1)

        def step(chunk):
            # A zero that the compiler does not know. Otherwise it would compute, before the first chunk, the descriptors of
            # all that products take from shared memory, which registers cannot hold.
            slot = chunk - jax.lax.optimization_barrier(chunk)
            q, k, v, do, de, dy, state, dstate, inverse, y, score, solve, *more_tiles = (
                tiles[name].at[slot] for name in shapes
            )
            dq_staged = more_tiles[0] if more_tiles else dy  # which nothing reads any more by then

            def errors(_, features):  # in the place of v
                held = product(k, state.at[features].T)
                error = read(v.at[:, features]) - held * along_rows(by_row(vector_tile.at[0, READ]))
                v.at[:, features][...] = rounded(error)
                y.at[:, features][...] = rounded(error * along_rows(by_row(vector_tile.at[0, BETA]), BLOCK))

            def written(_, features):
                y.at[:, features][...] = rounded(product(solve, y.at[:, features]))

            def scores():
                decay = decay_matrix(vector_tile, *indices())
                score[...] = rounded(product(do, y.T) * decay * scale)
                part_tile.at[kinds["total"].start][...] = functools.reduce(
                    jnp.add,
                    [
                        row_sum(
                            read(state.at[pl.ds(i, BLOCK), pl.ds(j, BLOCK)]),
                            read(dstate.at[pl.ds(i, BLOCK), pl.ds(j, BLOCK)]),
                        )
                        for i in range(0, value_dim, BLOCK)
                        for j in range(0, key_dim, BLOCK)
                    ],
                )

            def through_inverse():  # the gradient by A, times beta, takes the place of the inverse
                rows, columns = indices()
                lower = rows > columns
                beta = along_columns(by_column(vector_tile.at[1, BETA]))
                dsolve = product(dy, v.T) * decay_matrix(vector_tile, rows, columns)
                through = dsolve * read(inverse)
                # The only sum over columns: two warpgroups that both took one would share the memory for it.
                part_tile.at[kinds["solve columns"].start][...] = through.sum(axis=0)
                part_tile.at[kinds["solve rows"].start][...] = row_sum(through, beta)
                negative = rounded(jnp.where(lower, dsolve * (0.0 - beta), 0.0))
                solve[...] = rounded(product(negative, inverse.T))
                plgpu.commit_smem()
                dlower = jnp.where(visible(vector_tile, lower), product(inverse.T, solve), 0.0)
                part_tile.at[kinds["beta"].start][...] = row_sum(dlower, product(k, k.T))
                inverse[...] = rounded(dlower * along_rows(by_row(vector_tile.at[0, BETA])))

            def gradients(release, i, features):
                into = along_rows(by_row(vector_tile.at[0, READ]))
                asked = product(do, state.at[:, features]) * (into * scale)
                total = product(score, k.at[:, features], asked)
                dq_staged.at[:, features][...] = rounded(total)
                by_decay = row_sum(read(q.at[:, features]), total)
                keys = read(k.at[:, features])
                total = product(de, state.at[:, features]) * (0.0 - into)
                by_decay = by_decay + row_sum(keys, total)
                release()
                onward = along_rows(by_row(vector_tile.at[0, WRITE]))
                kept = product(y, dstate.at[:, features]) * onward
                sums = row_sum(keys, kept)
                part_tile.at[kinds["write"][i]][...] = sums
                scored = product(score.T, q.at[:, features])
                part_tile.at[kinds["decay"][i]][...] = by_decay - sums - row_sum(keys, scored)
                total = product(inverse, k.at[:, features], total + kept + scored)
                q.at[:, features][...] = rounded(product(inverse.T, k.at[:, features], total))

            more = (here == 0) & (chunk + 1 < ends)

            def release():  # frees what only the products until here read
                meet()
                pl.when(more)(lambda: bring(chunk + 1, "states", "v", "do", "de"))

            plgpu.barrier_wait(refs["arrived"])

            @pl.when(here == 1)
            def _():
                solve[...] = rounded(read(inverse) * decay_matrix(vector_tile, *indices()))

            shares(value_dim, errors)
            meet()
            shares(value_dim, written)
            plgpu.barrier_wait(refs["arrived_later"])
            meet()
            pl.when(here == 0)(scores)
            pl.when(here == 1)(through_inverse)
            meet()
            shares(key_dim, functools.partial(gradients, release))
            if key_dim == BLOCK:
                pl.when(here == 1)(release)
            meet()

            @pl.when(here == 0)
            def _():
                at = place("do", chunk)
                send([(dq_staged, dq.at[*at]), (q, dk.at[*at])])
                send([(part_tile, dvectors.at[row, head, chunk])])

            pl.when(more)(lambda: bring(chunk + 1, "k", "inverse", "dstates"))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            pl.when(more)(lambda: bring(chunk + 1, "q", "dy"))

        start = span * length
        pl.when(here == 0)(lambda: bring(start, *sorted(sources, key=lambda name: name not in FIRST)))

        @pl.loop(0, length)
        def _(turn):
            pl.when(start + turn < ends)(lambda: step(start + turn))

        plgpu.wait_smem_to_gmem(0)
        meet()

    return launch(
        body,
        name="delta_rule_gradients",
        grid={"row": batch, "head": heads, "span": spans},
        inputs=sources | {"vectors": vectors},
        outputs=outputs,
        scratch=scratch,
        barriers=True,
        warpgroups=2,
    )


def part_rows(key_dim: int) -> dict[str, range]:
    """Returns the rows of the `dvectors` of `chunk_gradients` that are to be added up; see `vector_gradients`."""
    blocks = key_dim // BLOCK
    counts = {"decay": blocks, "write": blocks, "solve rows": 1, "solve columns": 1, "beta": 1, "total": 1}
    ends = itertools.accumulate(counts.values())
    return {name: range(end - count, end) for (name, count), end in zip(counts.items(), ends, strict=True)}


def vector_gradients(parts: jax.Array, vectors: jax.Array, key_dim: int) -> jax.Array:
    """Returns the gradients of `vectors`; those by the decays are in the row of what they are exponentials of.

    Args:
      parts: `dvectors` of `chunk_gradients`, per head of the values; heads with the same `vectors` are neighbours.
    """
    if parts.shape[1] != vectors.shape[1]:
        parts = parts.reshape(*vectors.shape[:2], -1, *parts.shape[2:]).sum(2)
    sums = {name: parts[..., rows.start : rows.stop, :].sum(-2) for name, rows in part_rows(key_dim).items()}
    decay = sums["decay"] + sums["solve rows"] - vectors[..., BETA, :] * sums["solve columns"]
    # Decays up to the end of the chunk: from its tokens, and from the state that enters.
    last = sums["write"].sum(-1) + vectors[..., READ, -1] * sums["total"].sum(-1)
    rows = {DECAY: decay.at[..., -1].add(last), BETA: sums["beta"] + sums["solve columns"]}
    nothing = jnp.zeros_like(decay)
    return jnp.stack([rows.get(kind, nothing) for kind in range(vectors.shape[3])], axis=3)
