"""The Hopper kernels of `delta_rule`'s backward pass; gpu_forward.py has the equations and their letters.

With dS' the gradient of the state that leaves a chunk, in which e = v - r k S is the error of what the state holds,

    dy = P^T do + w k dS',   de = G^T dy = dv,   dS = total dS' + (scale r q)^T do - (r k)^T de,

which `chain` computes from the last chunk to the first, as `forward` does from the first to the last. Given S, dS', de and
dy, the rest is local to the chunks and `chunk_gradients` computes it for all of them at once:

    dP = do y^T,          dq = scale r do S^T + (scale dP o D) k,
    dG = dy e^T,          dT = dG o D with columns scaled by beta,   dA = - T^T dT T^T for j < i,
    dk = w y dS'^T - r de S^T + (scale dP o D)^T q + (beta dA + (beta dA)^T) k,

where A is that without decay. The gradients of the sums of log-decay come from dP o P and dG o G, row sums less column
sums; those of r and w from what they scale.

At 8 x 4096 tokens, 16 heads of 128, bfloat16, `chain` reads 0.54 GB and writes 0.54 GB, `chunk_gradients` reads 1.5 GB and
writes 0.27 GB: 0.95 ms at 3.0 TB/s, with the two kernels of gpu_forward.py 1.2 ms. Not yet measured.
"""

import functools

import jax
import jax.numpy as jnp

from layers.kernels.delta_rule.gpu_forward import Chain, chain_scratch
from layers.kernels.delta_rule.gpu_tiles import (
    BETA,
    BLOCK,
    CHUNK,
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

# Rows of the gradients of vectors: of the sums of log-decay, by the rows and by the columns of squares; of beta, likewise; of
# both decays; and of the decay of the whole state, in parts still to be added up.
PARTS = 7


def chain(
    q: jax.Array,
    k: jax.Array,
    do: jax.Array,
    vectors: jax.Array,
    made: dict[str, jax.Array],
    dfinal: jax.Array,
    scale: float,
    stages: int,
) -> dict[str, jax.Array]:
    """Walks through the chunks from the last to the first, with states transposed.

    Args:
      made: what `prepare` gives.
      dfinal: (b, h, v, k), float32.
      stages: chunks of inputs under way or in use.

    Returns:
      dstates: (b, h, chunks, v, k), bfloat16, gradients of the states that leave the chunks.
      dstate: (b, h, v, k), float32, that of the state that enters the first.
      dv, dy: (b, t, h, v), bfloat16.
    """
    sizes = sizes_of(k, do)
    batch, time, heads, _, key_dim, value_dim = sizes
    inputs = {
        name: (x,) for name, x in {"q": q, "k": k, "do": do, "vectors": vectors, "dfinal": dfinal}.items()
    }
    inputs |= {name: (made[name],) for name in ("solve", "scores")}
    wide = jax.ShapeDtypeStruct((batch, time, heads, value_dim), jnp.bfloat16)
    outputs = {
        "dstates": (jax.ShapeDtypeStruct((batch, heads, sizes.chunks, value_dim, key_dim), jnp.bfloat16),),
        "dstate": (jax.ShapeDtypeStruct((batch, heads, value_dim, key_dim), jnp.float32),),
        "dv": (wide,),
        "dy": (wide,),
    }
    arriving = [name for name in inputs if name != "dfinal"]
    scratch = chain_scratch(sizes, stages, vectors.shape[-2], arriving) | {
        "state_tile": matrices((sizes.blocks, BLOCK, key_dim), jnp.bfloat16),
        "dv_tile": matrices((sizes.blocks, CHUNK, BLOCK), jnp.bfloat16),
        "dy_tile": matrices((sizes.blocks, CHUNK, BLOCK), jnp.bfloat16),
    }

    def body(*, dfinal, dstates, dstate, dv, dy, state_tile, dv_tile, dy_tile, **refs):
        walk = Chain(sizes, stages, refs)
        (row, head), here = walk.at, walk.block

        def step(chunk, slot, dleaving):
            tiles = walk.tiles(slot)
            vector = tiles["vectors"]
            into, onward = (along_columns(by_column(vector.at[kind])) for kind in (READ, WRITE))
            rounded = dleaving.astype(jnp.bfloat16)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            state_tile.at[here][...] = rounded
            send([(state_tile.at[here], dstates[0].at[row, head, chunk, walk.features])])
            given = plgpu.load(tiles["do"].T, layout=plgpu.Layout.WGMMA, optimized=False)
            written = product(rounded, tiles["k"].T) * onward
            written = product(given, tiles["scores"], written).astype(jnp.bfloat16)
            error = product(written, tiles["solve"])
            dy_tile.at[here].T[...] = written
            dv_tile.at[here].T[...] = error.astype(jnp.bfloat16)
            place = row, pl.ds(chunk * CHUNK, CHUNK), head, walk.features
            send([(dy_tile.at[here], dy[0].at[*place]), (dv_tile.at[here], dv[0].at[*place])])
            asked = (given.astype(jnp.float32) * (into * scale)).astype(jnp.bfloat16)
            entering = product(asked, tiles["q"], dleaving * vector[READ, CHUNK - 1])
            return product((error * (0.0 - into)).astype(jnp.bfloat16), tiles["k"], entering)

        first = walk.walk(step, walk.enter(dfinal[0]), reverse=True)
        dstate[0].at[row, head, walk.features][...] = first
        plgpu.wait_smem_to_gmem(0)
        walk.leave()

    results = launch(
        body,
        name="delta_rule_backward",
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
    states: jax.Array,
    chained: dict[str, jax.Array],
    scale: float,
) -> dict[str, jax.Array]:
    """What is local to the chunks.

    Args:
      made: what `prepare` gives.
      states: what `forward` gives.
      chained: what `chain` gives.

    Returns:
      dq, dk: (b, t, h, k), bfloat16, for every head of the values.
      dvectors: (b, h, chunks, PARTS, c), float32.
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
        "states": states,
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
    outputs = {
        "dq": (keys,),
        "dk": (keys,),
        "dvectors": (jax.ShapeDtypeStruct((batch, heads, sizes.chunks, PARTS, CHUNK), jnp.float32),),
    }
    scratch = {f"{name}_tile": matrices(shape, jnp.bfloat16) for name, shape in shapes.items()} | {
        "y_tile": matrices((CHUNK, value_dim), jnp.bfloat16),
        "score_tile": matrices(SQUARE, jnp.bfloat16),
        "vector_tile": plgpu.SMEM((2, vectors.shape[-2], CHUNK), jnp.float32),
        "part_tile": plgpu.SMEM((PARTS, CHUNK), jnp.float32),
        **({} if key_dim == value_dim else {"dq_tile": matrices((CHUNK, key_dim), jnp.bfloat16)}),
        "arrived": plgpu.Barrier(num_arrivals=len(sources) + 2),
    }

    def body(*, vectors, dq, dk, dvectors, y_tile, score_tile, vector_tile, part_tile, arrived, **refs):
        row, head, chunk = (jax.lax.axis_index(name) for name in ("row", "head", "chunk"))
        tokens, shared = pl.ds(chunk * CHUNK, CHUNK), jax.lax.div(head, group)
        tiles = {name: refs[f"{name}_tile"] for name in sources}
        at = {
            **dict.fromkeys(("q", "k"), (row, tokens, shared)),
            **dict.fromkeys(("v", "do", "de", "dy"), (row, tokens, head)),
            **dict.fromkeys(("states", "dstates"), (row, head, chunk)),
            **dict.fromkeys(("solve", "inverse"), (row, head, tokens)),
        }
        fetch(
            [
                *((refs[name][0].at[*at[name]], tiles[name]) for name in sources),
                *((vectors[0].at[row, head, chunk], vector_tile.at[i]) for i in range(2)),
            ],
            arrived,
        )
        plgpu.barrier_wait(arrived)
        q, k, v, do, de, dy, state, dstate, solve, inverse = (tiles[name] for name in sources)
        rows, columns = places()
        into, onward, beta = (by_row(vector_tile.at[0, kind]) for kind in (READ, WRITE, BETA))
        beta_columns = along_columns(by_column(vector_tile.at[1, BETA]))
        decay = decay_matrix(vector_tile, rows, columns)

        def rounded(x):
            return x.astype(jnp.bfloat16)

        # The errors take the place of v.
        held = product(k, state.T)
        dinto = 0.0 - (read(de) * held).sum(axis=1)
        v[...] = rounded(read(v) - held * along_rows(into, value_dim))
        plgpu.commit_smem()
        y_tile[...] = rounded(product(solve, v))
        plgpu.commit_smem()

        # Through the scores to q. dq takes the place of do if it fits there.
        dscores = product(do, y_tile.T) * decay * scale
        score_tile[...] = rounded(dscores)
        through = dscores * product(q, k.T)
        sums = through.sum(axis=1), through.sum(axis=0)
        plgpu.commit_smem()
        asked = product(do, state) * scale
        part_tile.at[4][...] = dinto + (read(q) * asked).sum(axis=1)
        dq_tile = refs.get("dq_tile", do)
        dq_tile[...] = rounded(product(score_tile, k, asked * along_rows(into, key_dim)))

        # Through the inverse. Its gradient by A, times beta, takes its place.
        dsolve = product(dy, v.T) * decay
        through = dsolve * read(inverse)
        part_tile.at[3][...] = through.sum(axis=0)
        through = through * beta_columns
        part_tile.at[0][...] = sums[0] + through.sum(axis=1)
        part_tile.at[1][...] = sums[1] + through.sum(axis=0)
        lower = rows > columns
        negative = rounded(jnp.where(lower, dsolve * (0.0 - beta_columns), 0.0))
        solve[...] = rounded(product(negative, inverse.T))
        plgpu.commit_smem()
        dlower = jnp.where(visible(vector_tile, lower), product(inverse.T, solve), 0.0)
        part_tile.at[2][...] = (dlower * product(k, k.T)).sum(axis=1)
        dlower = rounded(dlower * along_rows(beta))
        inverse[...] = dlower
        plgpu.commit_smem()

        # The terms of dk, which takes the place of q.
        kept = product(y_tile, dstate)
        part_tile.at[5][...] = (read(k) * kept).sum(axis=1)
        total = kept * along_rows(onward, key_dim) - product(de, state) * along_rows(into, key_dim)
        total = product(score_tile.T, q, total)
        total = product(dlower, k, total)
        q[...] = rounded(product(inverse.T, k, total))

        # The decay of the whole state: blocks of its rows are added up here, the rest outside.
        part_tile.at[6][...] = functools.reduce(
            jnp.add,
            [
                (read(state.at[pl.ds(i, CHUNK)]) * read(dstate.at[pl.ds(i, CHUNK)])).sum(axis=1)
                for i in range(0, value_dim, CHUNK)
            ],
        )
        send(
            [
                (dq_tile, dq[0].at[row, tokens, head]),
                (q, dk[0].at[row, tokens, head]),
                (part_tile, dvectors[0].at[row, head, chunk]),
            ]
        )
        plgpu.wait_smem_to_gmem(0)

    results = launch(
        body,
        name="delta_rule_gradients",
        grid={"row": batch, "head": heads, "chunk": sizes.chunks},
        inputs={"vectors": (vectors,)} | {name: (source,) for name, source in sources.items()},
        outputs=outputs,
        scratch=scratch,
        barriers=True,
    )
    return {name: result[0] for name, result in results.items()}
