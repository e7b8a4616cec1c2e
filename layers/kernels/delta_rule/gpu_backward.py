"""The Hopper kernels of `delta_rule`'s backward pass; gpu_forward.py has the equations and their letters.

With dS' the gradient of the state that leaves a chunk, in which e = v - r k S is the error of what the state holds,

    dy = P^T do + w k dS',   de = beta G^T dy = dv,   dS = total dS' + (scale r q)^T do - (r k)^T de,

which `chain` computes from the last chunk to the first, as `forward` does from the first to the last. Given S, dS', de and
dy, the rest is local to the chunks and `chunk_gradients` computes it for all of them at once:

    dP = do y^T,          dq = scale r do S^T + (scale dP o D) k,
    dG = dy (beta e)^T,   dT = dG o D,   dA = - T^T dT T^T for j < i,
    dk = w y dS'^T - r de S^T + (scale dP o D)^T q + (beta dA + (beta dA)^T) k,

where A is that without decay. A sum of log-decay up to a token scales what its row of q and of e reads, and divides what
its row of k and of y writes: its gradient is q.dq + k.(the second term of dk) - k.(the first and third term of dk), and the
row sums less the column sums of dG o G, which is dT o T. The products of a chunk are shared by two warpgroups.

At 8 x 4096 tokens, 16 heads of 128, bfloat16, `chain` reads 0.54 GB and writes 0.54 GB, `chunk_gradients` reads 1.5 GB and
writes 0.27 GB: 0.95 ms at 3.0 TB/s, with the two kernels of gpu_forward.py 1.2 ms. An H100 takes 1.6 ms for all four;
both passes together take 2.1 to 2.2 ms, 4.2 times the floor, where plain JAX takes 10 to 12.
"""

import functools
import itertools

import jax
import jax.numpy as jnp

from layers.kernels.delta_rule.gpu_forward import Chain, chain_scratch
from layers.kernels.delta_rule.gpu_tiles import (
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
    places,
    read,
    send,
    sizes_of,
    visible,
)
from layers.kernels.mosaic_gpu import launch, matrices, pl, plgpu, product

# What `chunk_gradients` needs before the rest.
FIRST = ("k", "v", "de", "states", "solve")


def chain(
    q: jax.Array,
    k: jax.Array,
    do: jax.Array,
    vectors: jax.Array,
    made: dict[str, jax.Array],
    dfinal: jax.Array,
    scale: float,
    stages: int,
    *,
    keeping: bool = True,
) -> dict[str, jax.Array]:
    """Walks through the chunks from the last to the first, with states transposed.

    Args:
      made: what `prepare` gives.
      dfinal: (b, h, v, k), float32.
      stages: chunks of inputs under way or in use.
      keeping: whether anything but `dstate` is needed.

    Returns:
      dstate: (b, h, v, k), float32, the gradient of the state that enters the first chunk.
      dstates: (b, h, chunks, v, k), bfloat16, those of the states that leave the chunks.
      dv, dy: (b, t, h, v), bfloat16.
    """
    sizes = sizes_of(k, do)
    batch, time, heads, _, key_dim, value_dim = sizes
    inputs = {
        name: (x,) for name, x in {"q": q, "k": k, "do": do, "vectors": vectors, "dfinal": dfinal}.items()
    }
    inputs |= {name: (made[name],) for name in ("solve", "scores")}
    wide = jax.ShapeDtypeStruct((batch, time, heads, value_dim), jnp.bfloat16)
    outputs = {"dstate": (jax.ShapeDtypeStruct((batch, heads, value_dim, key_dim), jnp.float32),)}
    arriving = [name for name in inputs if name != "dfinal"]
    scratch = chain_scratch(sizes, stages, vectors.shape[-2], arriving)
    if keeping:
        shape = (batch, heads, sizes.chunks, value_dim, key_dim)
        outputs |= {"dstates": (jax.ShapeDtypeStruct(shape, jnp.bfloat16),), "dv": (wide,), "dy": (wide,)}
        scratch |= {
            "state_tile": matrices((sizes.blocks, BLOCK, key_dim), jnp.bfloat16),
            "dv_tile": matrices((sizes.blocks, CHUNK, BLOCK), jnp.bfloat16),
            "dy_tile": matrices((sizes.blocks, CHUNK, BLOCK), jnp.bfloat16),
        }

    def body(*, dfinal, dstate, **refs):
        kept = {name: refs.pop(name)[0] for name in ("dstates", "dv", "dy") if keeping}
        own = {name: refs.pop(name) for name in ("state_tile", "dv_tile", "dy_tile") if keeping}
        walk = Chain(sizes, stages, refs)
        (row, head), here = walk.at, walk.block

        def step(chunk, slot, dleaving):
            tiles = walk.tiles(slot)
            vector = tiles["vectors"]
            into, onward, beta = (along_columns(by_column(vector.at[kind])) for kind in (READ, WRITE, BETA))
            rounded = dleaving.astype(jnp.bfloat16)
            if keeping:
                tile = own["state_tile"].at[here]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                tile[...] = rounded
                send([(tile, kept["dstates"].at[row, head, chunk, walk.features])])
            given = plgpu.load(tiles["do"].T, layout=plgpu.Layout.WGMMA, optimized=False)
            written = product(rounded, tiles["k"].T) * onward
            written = product(given, tiles["scores"], written).astype(jnp.bfloat16)
            error = product(written, tiles["solve"]) * beta
            if keeping:
                place = row, pl.ds(chunk * CHUNK, CHUNK), head, walk.features
                own["dy_tile"].at[here].T[...] = written
                own["dv_tile"].at[here].T[...] = error.astype(jnp.bfloat16)
                send([(own[f"{name}_tile"].at[here], kept[name].at[*place]) for name in ("dy", "dv")])
            asked = (given.astype(jnp.float32) * (into * scale)).astype(jnp.bfloat16)
            entering = product(asked, tiles["q"], dleaving * vector[READ, CHUNK - 1])
            return product((error * (0.0 - into)).astype(jnp.bfloat16), tiles["k"], entering)

        first = walk.walk(step, walk.enter(dfinal[0]), reverse=True)
        dstate[0].at[row, head, walk.features][...] = first
        plgpu.wait_smem_to_gmem(0)
        walk.leave()

    results = launch(
        body,
        name="delta_rule_backward" if keeping else "delta_rule_backward_ends",
        grid={"row": batch, "head": heads},
        inputs=inputs,
        outputs=outputs,
        scratch=scratch,
        barriers=True,
        warpgroups=sizes.blocks,
    )
    return {name: result[0] for name, result in results.items()}


def chunk_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    vectors: jax.Array,
    made: dict[str, jax.Array],
    chained: dict[str, jax.Array],
    scale: float,
) -> dict[str, jax.Array]:
    """What is local to the chunks.

    Args:
      made: what `prepare` gives, and the states.
      chained: what `chain` gives.

    Returns:
      dq, dk: (b, t, h, k), bfloat16, for every head of the values.
      dvectors: (b, h, chunks, rows, c), float32; see `part_rows`.
    """
    sizes = sizes_of(k, v)
    batch, time, heads, group, key_dim, value_dim = sizes
    sources = {
        "q": q,
        "k": k,
        "v": v,
        "do": do,
        "de": chained["dv"],
        "dy": chained["dy"],
        "states": made["states"],
        "dstates": chained["dstates"],
        "solve": made["solve"],
        "inverse": made["inverse"],
    }
    shapes = {
        **dict.fromkeys(("q", "k"), (CHUNK, key_dim)),
        **dict.fromkeys(("v", "do", "de", "dy"), (CHUNK, value_dim)),
        **dict.fromkeys(("states", "dstates"), (value_dim, key_dim)),
        **dict.fromkeys(("solve", "inverse"), SQUARE),
    }
    keys = jax.ShapeDtypeStruct((batch, time, heads, key_dim), jnp.bfloat16)
    kinds = part_rows(key_dim)
    parts = max(rows.stop for rows in kinds.values())
    outputs = {
        "dq": (keys,),
        "dk": (keys,),
        "dvectors": (jax.ShapeDtypeStruct((batch, heads, sizes.chunks, parts, CHUNK), jnp.float32),),
    }
    scratch = {f"{name}_tile": matrices(shape, jnp.bfloat16) for name, shape in shapes.items()} | {
        "y_tile": matrices((CHUNK, value_dim), jnp.bfloat16),
        "score_tile": matrices(SQUARE, jnp.bfloat16),
        "vector_tile": plgpu.SMEM((2, vectors.shape[-2], CHUNK), jnp.float32),
        "part_tile": plgpu.SMEM((parts, CHUNK), jnp.float32),
        **({} if key_dim == value_dim else {"dq_tile": matrices((CHUNK, key_dim), jnp.bfloat16)}),
        "arrived": plgpu.Barrier(num_arrivals=len(FIRST) + 2),
        "arrived_later": plgpu.Barrier(num_arrivals=len(sources) - len(FIRST)),
        "met": plgpu.Barrier(num_arrivals=2),
    }

    def body(*, vectors, dq, dk, dvectors, y_tile, score_tile, vector_tile, part_tile, met, **refs):
        row, head, chunk = (jax.lax.axis_index(name) for name in ("row", "head", "chunk"))
        here = jax.lax.axis_index("warpgroup")
        tokens, shared = pl.ds(chunk * CHUNK, CHUNK), jax.lax.div(head, group)
        tiles = {name: refs[f"{name}_tile"] for name in sources}
        at = {
            **dict.fromkeys(("q", "k"), (row, tokens, shared)),
            **dict.fromkeys(("v", "do", "de", "dy"), (row, tokens, head)),
            **dict.fromkeys(("states", "dstates"), (row, head, chunk)),
            **dict.fromkeys(("solve", "inverse"), (row, head, tokens)),
        }
        pairs = {name: (refs[name][0].at[*at[name]], tiles[name]) for name in sources}

        @pl.when(here == 0)
        def _():
            numbers = [(vectors[0].at[row, head, chunk], vector_tile.at[i]) for i in range(2)]
            fetch([*(pairs[name] for name in FIRST), *numbers], refs["arrived"])
            fetch([pairs[name] for name in sources if name not in FIRST], refs["arrived_later"])

        def meet():
            """Waits until both warpgroups have written and read what they had to."""
            plgpu.commit_smem()
            plgpu.barrier_arrive(met)
            plgpu.barrier_wait(met)

        def shares(width, work):
            """Each warpgroup runs `work(number, columns)` for its part of the columns, if there are enough."""
            for i in range(width // BLOCK):
                pl.when(here == i)(functools.partial(work, i, pl.ds(i * BLOCK, BLOCK)))

        def rounded(x):
            return x.astype(jnp.bfloat16)

        def row_sum(x, y):
            return (x * y).sum(axis=1)

        plgpu.barrier_wait(refs["arrived"])
        q, k, v, do, de, dy, state, dstate, solve, inverse = (tiles[name] for name in sources)
        into = along_rows(by_row(vector_tile.at[0, READ]))

        def errors(_, features):  # in the place of v
            held = product(k, state.at[features].T)
            error = read(v.at[:, features]) - held * into
            v.at[:, features][...] = rounded(error)
            y_tile.at[:, features][...] = rounded(error * along_rows(by_row(vector_tile.at[0, BETA]), BLOCK))

        def written(_, features):
            y_tile.at[:, features][...] = rounded(product(solve, y_tile.at[:, features]))

        shares(value_dim, errors)
        meet()
        shares(value_dim, written)
        plgpu.barrier_wait(refs["arrived_later"])
        meet()

        @pl.when(here == 0)
        def _():
            decay = decay_matrix(vector_tile, *places())
            score_tile[...] = rounded(product(do, y_tile.T) * decay * scale)
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

        @pl.when(here == 1)
        def _():  # The gradient by A, times beta, takes the place of the inverse.
            rows, columns = places()
            lower = rows > columns
            beta = along_columns(by_column(vector_tile.at[1, BETA]))
            dsolve = product(dy, v.T) * decay_matrix(vector_tile, rows, columns)
            through = dsolve * read(inverse)
            # The one sum over columns: warpgroups that both took one would share the memory for it.
            part_tile.at[kinds["solve columns"].start][...] = through.sum(axis=0)
            part_tile.at[kinds["solve rows"].start][...] = row_sum(through, beta)
            negative = rounded(jnp.where(lower, dsolve * (0.0 - beta), 0.0))
            solve[...] = rounded(product(negative, inverse.T))
            plgpu.commit_smem()
            dlower = jnp.where(visible(vector_tile, lower), product(inverse.T, solve), 0.0)
            part_tile.at[kinds["beta"].start][...] = row_sum(dlower, product(k, k.T))
            inverse[...] = rounded(dlower * along_rows(by_row(vector_tile.at[0, BETA])))

        meet()
        dq_tile = refs.get("dq_tile", dy)  # dy, which nothing reads any more, if it fits

        def gradients(i, features):
            asked = product(do, state.at[:, features]) * (into * scale)
            total = product(score_tile, k.at[:, features], asked)
            dq_tile.at[:, features][...] = rounded(total)
            by_decay = row_sum(read(q.at[:, features]), total)
            keys = read(k.at[:, features])
            total = product(de, state.at[:, features]) * (0.0 - into)
            by_decay = by_decay + row_sum(keys, total)
            onward = along_rows(by_row(vector_tile.at[0, WRITE]))
            kept = product(y_tile, dstate.at[:, features]) * onward
            sums = row_sum(keys, kept)
            part_tile.at[kinds["write"][i]][...] = sums
            scored = product(score_tile.T, q.at[:, features])
            part_tile.at[kinds["decay"][i]][...] = by_decay - sums - row_sum(keys, scored)
            total = product(inverse, k.at[:, features], total + kept + scored)
            q.at[:, features][...] = rounded(product(inverse.T, k.at[:, features], total))

        shares(key_dim, gradients)
        meet()

        @pl.when(here == 0)
        def _():
            place = row, tokens, head
            send(
                [
                    (dq_tile, dq[0].at[*place]),
                    (q, dk[0].at[*place]),
                    (part_tile, dvectors[0].at[row, head, chunk]),
                ]
            )

        plgpu.wait_smem_to_gmem(0)
        meet()

    results = launch(
        body,
        name="delta_rule_gradients",
        grid={"row": batch, "head": heads, "chunk": sizes.chunks},
        inputs={"vectors": (vectors,)} | {name: (source,) for name, source in sources.items()},
        outputs=outputs,
        scratch=scratch,
        barriers=True,
        warpgroups=2,
    )
    return {name: result[0] for name, result in results.items()}


def part_rows(key_dim: int) -> dict[str, range]:
    """The rows of the `dvectors` of `chunk_gradients`, which are to be added up; see `vector_gradients`."""
    blocks = key_dim // BLOCK
    counts = {"decay": blocks, "write": blocks, "solve rows": 1, "solve columns": 1, "beta": 1, "total": 1}
    ends = itertools.accumulate(counts.values())
    return {name: range(end - count, end) for (name, count), end in zip(counts.items(), ends, strict=True)}


def vector_gradients(parts: jax.Array, vectors: jax.Array, key_dim: int) -> jax.Array:
    """The gradients of `vectors`, those by the decays in the row of what they are exponentials of."""
    sums = {name: parts[..., rows.start : rows.stop, :].sum(-2) for name, rows in part_rows(key_dim).items()}
    decay = sums["decay"] + sums["solve rows"] - vectors[..., BETA, :] * sums["solve columns"]
    # Decays up to the end of the chunk: from its tokens, and from the state that enters.
    last = sums["write"].sum(-1) + vectors[..., READ, -1] * sums["total"].sum(-1)
    rows = {DECAY: decay.at[..., -1].add(last), BETA: sums["beta"] + sums["solve columns"]}
    nothing = jnp.zeros_like(decay)
    return jnp.stack([rows.get(kind, nothing) for kind in range(vectors.shape[3])], axis=3)
