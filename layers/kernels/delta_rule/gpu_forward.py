"""The Hopper kernels of `delta_rule`'s forward pass, which its backward pass uses too.

In a chunk of c tokens that the state S enters, with D the decay from token j to token i >= j,

    T = (I + A)^-1,   A_ij = beta_i k_i.k_j for j < i,      G = T o D,
    y = G beta (v - r k S),   o = scale r q S + P y,   P = scale (q k^T) o D,   S <- total S + (w k)^T y,

where r decays from the state that enters and w to the state that leaves. The decay needs no part in T, because it changes
A by a diagonal similarity: (I + A o D)^-1 = T o D. `prepare` computes T, G and P for all chunks at once; T grows from
the diagonal, X <- X - X L X with L the entries of A that join two neighbouring blocks of 1, 2, 4, ... tokens. `forward` walks
through the chunks of a row and head. Each of its warpgroups holds S^T for 64 features of the values in registers, where
every product of a chunk takes it from, transposed, so that nothing of the chain but inputs goes through shared memory.

At 8 x 4096 tokens, 16 heads of 128, bfloat16: `prepare` reads 0.27 GB and writes 0.13 GB (0.2 GB with T), `forward`
reads 0.54 GB and writes 0.13 GB; 0.36 ms at 3.0 TB/s. An H100 takes 0.52 ms for both, with or without decay: 2.8 times
the floor of the primitive, which would read and write q, k, v and o once, and an eighth of the time of plain JAX.
"""

from typing import Any

import jax
import jax.numpy as jnp

from layers.kernels.delta_rule.gpu_tiles import (
    BETA,
    BLOCK,
    CHUNK,
    READ,
    SQUARE,
    WRITE,
    Sizes,
    along_columns,
    along_rows,
    by_column,
    by_row,
    decay_matrix,
    fetch,
    places,
    read,
    send,
    visible,
)
from layers.kernels.mosaic_gpu import launch, matrices, pl, plgpu, product


def prepare(
    q: jax.Array, k: jax.Array, vectors: jax.Array, scale: float, *, refinements: int, inverse: bool
) -> dict[str, jax.Array]:
    """`solve` G and `scores` P of every chunk, and the `inverse` T if asked for: (b, h, chunks * c, c), bfloat16.

    Args:
      refinements: steps of Newton's method, X <- X - X ((I + A) X - I), with X rounded and A the sum of two rounded
        matrices. Rounding in the products before leaves a twentieth of T wrong where beta is near 2 and keys are alike.
        After one step that is 2e-3 to 3e-3, after two 1.5e-3, as much as rounding T to bfloat16 leaves wrong.
    """
    batch, _, groups, key_dim = k.shape
    _, heads, chunks, kinds, _ = vectors.shape
    square = jax.ShapeDtypeStruct((batch, heads, chunks * CHUNK, CHUNK), jnp.bfloat16)
    names = ("solve", "scores", "inverse") if inverse else ("solve", "scores")
    scratch = {
        "q_tile": matrices((CHUNK, key_dim), jnp.bfloat16),
        "k_tile": matrices((CHUNK, key_dim), jnp.bfloat16),
        "x_tile": matrices(SQUARE, jnp.bfloat16),
        "y_tile": matrices(SQUARE, jnp.bfloat16),
        "p_tile": matrices(SQUARE, jnp.bfloat16),
        "vector_tile": plgpu.SMEM((2, kinds, CHUNK), jnp.float32),
        "arrived": plgpu.Barrier(num_arrivals=4),
    }

    def body(*, q, k, vectors, q_tile, k_tile, x_tile, y_tile, p_tile, vector_tile, arrived, **results):
        row, head, chunk = (jax.lax.axis_index(name) for name in ("row", "head", "chunk"))
        tokens, shared = pl.ds(chunk * CHUNK, CHUNK), jax.lax.div(head, heads // groups)
        fetch(
            [
                (k[0].at[row, tokens, shared], k_tile),
                (q[0].at[row, tokens, shared], q_tile),
                *((vectors[0].at[row, head, chunk], vector_tile.at[i]) for i in range(2)),
            ],
            arrived,
        )
        plgpu.barrier_wait(arrived)
        rows, columns = places()
        products = product(k_tile, k_tile.T) * along_rows(by_row(vector_tile.at[0, BETA]))
        lower = jnp.where(visible(vector_tile, rows > columns), products, 0.0)
        y_tile[...] = lower.astype(jnp.bfloat16)
        p_tile[...] = (lower - lower.astype(jnp.bfloat16).astype(jnp.float32)).astype(jnp.bfloat16)
        x = jnp.where(rows == columns, 1.0, 0.0) - jnp.where(_joins(rows, columns, 1), lower, 0.0)
        block = 2
        while block < CHUNK:
            # X is zero but in blocks on the diagonal, so that where L joins two of them, X L X has no other part of it.
            rounded = x.astype(jnp.bfloat16)
            x_tile[...] = rounded
            plgpu.commit_smem()
            joined = product(product(rounded, y_tile).astype(jnp.bfloat16), x_tile)
            x -= jnp.where(_joins(rows, columns, block), joined, 0.0)
            block *= 2
        identity = jnp.where(rows == columns, 1.0, 0.0)
        for _ in range(refinements):
            rounded = x.astype(jnp.bfloat16)
            x_tile[...] = rounded
            y_tile[...] = lower.astype(jnp.bfloat16)
            plgpu.commit_smem()
            x = rounded.astype(jnp.float32)
            residual = product(p_tile, x_tile, product(y_tile, x_tile, x - identity))
            y_tile[...] = residual.astype(jnp.bfloat16)
            plgpu.commit_smem()
            x -= product(rounded, y_tile)
        decay = decay_matrix(vector_tile, rows, columns)
        p_tile[...] = (product(q_tile, k_tile.T) * decay * scale).astype(jnp.bfloat16)
        y_tile[...] = (x * decay).astype(jnp.bfloat16)
        if inverse:
            x_tile[...] = x.astype(jnp.bfloat16)
        tiles = {"solve": y_tile, "scores": p_tile, "inverse": x_tile}
        send([(tiles[name], results[name][0].at[row, head, tokens]) for name in names])
        plgpu.wait_smem_to_gmem(0)

    results = launch(
        body,
        name="delta_rule_prepare",
        grid={"row": batch, "head": heads, "chunk": chunks},
        inputs={"q": (q,), "k": (k,), "vectors": (vectors,)},
        outputs=dict.fromkeys(names, (square,)),
        scratch=scratch,
        barriers=True,
    )
    return {name: result[0] for name, result in results.items()}


def _joins(rows: jax.Array, columns: jax.Array, block: int) -> jax.Array:
    """Where the row is in an odd block and the column in the block before it."""
    rows, columns = (jax.lax.shift_right_logical(x, block.bit_length() - 1) for x in (rows, columns))
    return ((rows & 1) == 1) & (columns == rows - 1)


def forward(
    k: jax.Array,
    v: jax.Array | None,
    vectors: jax.Array,
    solve: jax.Array,
    state: jax.Array,
    scale: float,
    stages: int,
    *,
    reading: tuple[jax.Array, jax.Array] | None,
    keeping: bool,
) -> dict[str, jax.Array]:
    """Walks through the chunks, with states transposed.

    Args:
      v: None for zeros.
      state: (b, h, v, k), float32.
      stages: chunks of inputs under way or in use.
      reading: q and `scores`, or None if the output is not needed.
      keeping: whether the states are.

    Returns:
      final: the state that leaves the last chunk.
      o: (b, t, h, v), bfloat16, the output; only if `reading`.
      states: (b, h, chunks, v, k), bfloat16, those that enter the chunks; only if `keeping`.
    """
    _, heads, value_dim, _ = state.shape
    batch, time, groups, key_dim = k.shape
    sizes = Sizes(batch, time, heads, heads // groups, key_dim, value_dim)
    carried = jax.ShapeDtypeStruct((batch, heads, value_dim, key_dim), jnp.float32)
    inputs = {"k": (k,), "vectors": (vectors,), "solve": (solve,), "state": (state,)}
    outputs = {"final": (carried,)}
    scratch = {}
    if v is not None:
        inputs["v"] = (v,)
    if keeping:
        shape = (batch, heads, sizes.chunks, value_dim, key_dim)
        outputs["states"] = (jax.ShapeDtypeStruct(shape, jnp.bfloat16),)
        scratch["state_tile"] = matrices((sizes.blocks, BLOCK, key_dim), jnp.bfloat16)
    if reading is not None:
        inputs |= {"q": (reading[0],), "scores": (reading[1],)}
        outputs["o"] = (jax.ShapeDtypeStruct((batch, time, heads, value_dim), jnp.bfloat16),)
        scratch["o_tile"] = matrices((sizes.blocks, CHUNK, BLOCK), jnp.bfloat16)
    scratch |= chain_scratch(sizes, stages, vectors.shape[-2], [name for name in inputs if name != "state"])

    def body(*, state, final, states=None, o=None, state_tile=None, o_tile=None, **refs):
        chain = Chain(sizes, stages, refs)
        at, here = chain.at, chain.block

        def step(chunk, slot, state):
            tiles = chain.tiles(slot)
            vector = tiles["vectors"]
            into, beta = (along_columns(by_column(vector.at[kind])) for kind in (READ, BETA))
            rounded = state.astype(jnp.bfloat16)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if states is not None:
                state_tile.at[here][...] = rounded
                send([(state_tile.at[here], states[0].at[*at, chunk, chain.features])])
            seen = product(rounded, tiles["k"].T)
            error = read(tiles["v"].T) - seen * into if "v" in tiles else seen * (0.0 - into)
            written = product((error * beta).astype(jnp.bfloat16), tiles["solve"].T)
            if o is not None:
                before = product(rounded, tiles["q"].T) * into * scale
                result = product(written.astype(jnp.bfloat16), tiles["scores"].T, before)
                o_tile.at[here].T[...] = result.astype(jnp.bfloat16)
                tokens = pl.ds(chunk * CHUNK, CHUNK)
                send([(o_tile.at[here], o[0].at[at[0], tokens, at[1], chain.features])])
            onward = (written * along_columns(by_column(vector.at[WRITE]))).astype(jnp.bfloat16)
            return product(onward, tiles["k"], state * vector[READ, CHUNK - 1])

        last = chain.walk(step, chain.enter(state[0]))
        final[0].at[*at, chain.features][...] = last
        plgpu.wait_smem_to_gmem(0)
        chain.leave()

    results = launch(
        body,
        name="delta_rule_states" if reading is None else "delta_rule",
        grid={"row": batch, "head": heads},
        inputs=inputs,
        outputs=outputs,
        scratch=scratch,
        barriers=True,
        warpgroups=sizes.blocks,
    )
    return {name: result[0] for name, result in results.items()}


def chain_scratch(sizes: Sizes, stages: int, kinds: int, names: list[str]) -> dict[str, Any]:
    """Shared memory of the inputs of `stages` chunks, and barriers."""
    shapes = {
        **dict.fromkeys(("q", "k"), (CHUNK, sizes.key_dim)),
        **dict.fromkeys(("v", "do"), (sizes.blocks, CHUNK, BLOCK)),
        **dict.fromkeys(("solve", "scores"), SQUARE),
    }
    tiles = {
        f"{name}_tiles": matrices((stages, *shapes[name]), jnp.bfloat16)
        for name in names
        if name != "vectors"
    }
    tiles["vectors_tiles"] = plgpu.SMEM((stages, kinds, CHUNK), jnp.float32)
    copies = sum(sizes.blocks if name in ("v", "do") else 1 for name in names)
    return tiles | {
        "arrived": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        "used": plgpu.Barrier(num_arrivals=sizes.blocks, num_barriers=stages),
        "done": plgpu.Barrier(num_arrivals=sizes.blocks),
    }


class Chain:
    """One warpgroup on its walk through the chunks of a row and head; the first of the block fetches for all."""

    def __init__(self, sizes: Sizes, stages: int, refs: dict[str, Any]):
        self._sizes, self._stages = sizes, stages
        self._arrived, self._used, self._done = (refs.pop(name) for name in ("arrived", "used", "done"))
        self._tiles = {name.removesuffix("_tiles"): refs[name] for name in refs if name.endswith("_tiles")}
        self._sources = {name: refs[name][0] for name in self._tiles}
        self.at = jax.lax.axis_index("row"), jax.lax.axis_index("head")
        self.block = jax.lax.axis_index("warpgroup")
        self.features = pl.ds(self.block * BLOCK, BLOCK)

    def enter(self, state: Any) -> jax.Array:
        """This warpgroup's part of an array (b, h, v, k)."""
        ref = state.at[*self.at, self.features]
        # The product takes off the mark of arrays that differ between devices, which loops would not let through.
        return 1.0 * plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)

    def tiles(self, slot: Any) -> dict[str, Any]:
        return {
            name: ref.at[slot, self.block] if name in ("v", "do") else ref.at[slot]
            for name, ref in self._tiles.items()
        }

    def walk(self, step: Any, carry: Any, *, reverse: bool = False) -> Any:
        """Runs `step(chunk, slot, carry)`, which must have waited for its products; not for copies out."""
        stages, chunks = self._stages, self._sizes.chunks
        (row, head), sizes = self.at, self._sizes
        shared = jax.lax.div(head, sizes.group)

        def place(turn):
            return chunks - 1 - turn if reverse else turn

        def bring(turn, slot):
            chunk = place(turn)
            tokens = pl.ds(chunk * CHUNK, CHUNK)
            pairs = []
            for name, source in self._sources.items():
                target = self._tiles[name].at[slot]
                if name in ("q", "k"):
                    pairs.append((source.at[row, tokens, shared], target))
                elif name in ("v", "do"):
                    pairs += [
                        (source.at[row, tokens, head, pl.ds(i * BLOCK, BLOCK)], target.at[i])
                        for i in range(sizes.blocks)
                    ]
                elif name == "vectors":
                    pairs.append((source.at[row, head, chunk], target))
                else:
                    pairs.append((source.at[row, head, tokens], target))
            fetch(pairs, self._arrived.at[slot])

        first = self.block == 0

        @pl.when(first)
        def _():
            pl.loop(0, min(stages, chunks))(lambda turn: bring(turn, turn))

        def go(turn, carry):
            before = turn - 1

            @pl.when(first & (turn > 0) & (before + stages < chunks))
            def _():
                slot = jax.lax.rem(before, stages)
                plgpu.barrier_wait(self._used.at[slot])
                bring(before + stages, slot)

            slot = jax.lax.rem(turn, stages)
            plgpu.barrier_wait(self._arrived.at[slot])
            carry = step(place(turn), slot, carry)
            plgpu.commit_smem()  # what this warpgroup read here, a copy may now overwrite
            plgpu.barrier_arrive(self._used.at[slot])
            return carry

        carry = jax.lax.fori_loop(0, chunks, go, carry)

        @pl.when(first)
        def _():  # every turn of a barrier must have been waited for
            for turn in range(max(chunks - stages, 0), chunks):
                plgpu.barrier_wait(self._used.at[turn % stages])

        return carry

    def leave(self) -> None:
        """Ends together with the other warpgroups of the block."""
        plgpu.barrier_arrive(self._done)
        plgpu.barrier_wait(self._done)
