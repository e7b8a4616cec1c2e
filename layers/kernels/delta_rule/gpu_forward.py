"""The Hopper kernels of `delta_rule`'s forward pass, which its backward pass uses too.

In a chunk of c tokens that the state S enters, with D the decay from token j to token i >= j,

    T = (I + A)^-1,   A_ij = beta_i k_i.k_j for j < i,      G = T o D,
    y = G beta (v - r k S),   o = scale r q S + P y,   P = scale (q k^T) o D,   S <- total S + (w k)^T y,

where r decays from the state that enters and w to the state that leaves. The decay needs no part in T, because it changes
A by a diagonal similarity: (I + A o D)^-1 = T o D. `prepare` computes T for all chunks at once; it grows from the diagonal,
X <- X - X L X with L the entries of A that join two neighbouring blocks of 1, 2, 4, ... tokens. `forward` walks through the
chunks of a row and head. Each of its warpgroups holds S^T for 64 features of the values in registers, where every product
of a chunk takes it from, transposed, so that nothing of the chain but inputs goes through shared memory. One warpgroup
more fetches the chunks and makes G and P of them ahead of the walk.

At 8 x 4096 tokens, 16 heads of 128, bfloat16, at 3.0 TB/s and 400 TFLOP/s:

                             read      written       bytes     products
    prepare                  0.13 GB   0.07 GB     0.07 ms      0.19 ms
    forward                  0.47 GB   0.13 GB     0.20 ms      0.19 ms
    forward, states alone    0.34 GB   0.27 GB     0.20 ms      0.11 ms

The products of `prepare` are a chain, of 64 x 64 each, that waits for itself: with warpgroups for several chunks on every
processor it is bound by instructions, about 0.1 ms. An H100 took 0.52 ms for the forward pass, with or without decay, 2.8
times the floor of the primitive, when `prepare` made G and P as well (1.07 GB in all, not 0.8), one chunk a block, and
registers let two blocks run on a processor. This version has not been timed.
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
    in_turn,
    places,
    read,
    send,
    visible,
)
from layers.kernels.mosaic_gpu import launch, matrices, pl, plgpu, product

TURNS = 4  # chunks that a warpgroup of `prepare` inverts, at most
# Registers of a lane of `Chain`: of the warpgroup that serves, and of two that walk. Three start with 168 each.
SERVING, WALKING = 104, 200


def prepare(k: jax.Array, vectors: jax.Array, refinements: int, workers: int) -> jax.Array:
    """The inverse T of every chunk, (b, h, chunks * c, c), bfloat16.

    Every warpgroup inverts some chunks, each a chain of small products in which it mostly waits: blocks have several of
    them. What a chunk needs comes while the one before is inverted.

    Args:
      workers: warpgroups of a block. Four leave each lane 128 registers, which spills some of what all chunks share.
      refinements: steps of Newton's method, X <- X - X ((I + A) X - I), with X rounded and A the sum of two rounded
        matrices. Rounding in the products before leaves a twentieth of T wrong where beta is near 2 and keys are alike.
        After one step that is 2e-3 to 3e-3, after two 1.5e-3, as much as rounding T to bfloat16 leaves wrong.
    """
    batch, _, groups, key_dim = k.shape
    _, heads, chunks, kinds, _ = vectors.shape
    inverse = jax.ShapeDtypeStruct((batch, heads, chunks * CHUNK, CHUNK), jnp.bfloat16)
    workers = min(workers, chunks)
    turns = in_turn(batch * heads * chunks // workers, TURNS)
    share = workers * turns
    scratch = {
        "k_tiles": matrices((workers, CHUNK, key_dim), jnp.bfloat16),
        **{f"{name}_tiles": matrices((workers, *SQUARE), jnp.bfloat16) for name in ("x", "high", "low")},
        "vector_tiles": plgpu.SMEM((workers, 2, kinds, CHUNK), jnp.float32),
        "arrived": plgpu.Barrier(num_arrivals=3, num_barriers=workers),
    }

    def body(*, k, vectors, inverse, k_tiles, x_tiles, high_tiles, low_tiles, vector_tiles, arrived):
        row, head, span, here = (jax.lax.axis_index(x) for x in ("row", "head", "span", "warpgroup"))
        shared = jax.lax.div(head, heads // groups)

        def bring(chunk):
            numbers = [(vectors[0].at[row, head, chunk], vector_tiles.at[here, i]) for i in range(2)]
            keys = k[0].at[row, pl.ds(chunk * CHUNK, CHUNK), shared]
            fetch([(keys, k_tiles.at[here]), *numbers], arrived.at[here])

        def invert(chunk, after):
            # As in `chunk_gradients`, what depends on the place of tiles is to be computed where it is used.
            tiles = (k_tiles, x_tiles, high_tiles, low_tiles, vector_tiles)
            own = jax.lax.optimization_barrier(here)
            k_tile, x_tile, high_tile, low_tile, vector_tile = (ref.at[own] for ref in tiles)
            plgpu.barrier_wait(arrived.at[here])
            rows, columns = places()
            products = product(k_tile, k_tile.T) * along_rows(by_row(vector_tile.at[0, BETA]))
            lower = jnp.where(visible(vector_tile, rows > columns), products, 0.0)
            high = lower.astype(jnp.bfloat16)
            high_tile[...] = high
            low_tile[...] = (lower - high.astype(jnp.float32)).astype(jnp.bfloat16)
            x = jnp.where(rows == columns, 1.0, jnp.where(_joins(rows, columns, 1), 0.0 - lower, 0.0))
            x = x.astype(jnp.bfloat16)
            plgpu.commit_smem()
            pl.when(after < ends)(lambda: bring(after))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            block = 2
            while block < CHUNK:
                # X is zero but in blocks on the diagonal: where L joins two of them, X L X has no other part of it, and
                # what is there already stays as it is.
                x_tile[...] = x
                plgpu.commit_smem()
                joined = product(product(x, high_tile).astype(jnp.bfloat16), x_tile)
                joined = jnp.where(_joins(rows, columns, block), joined, 0.0)
                x = (x.astype(jnp.float32) - joined).astype(jnp.bfloat16)
                block *= 2
            for _ in range(refinements):
                x_tile[...] = x
                plgpu.commit_smem()
                start = x.astype(jnp.float32)
                start = jnp.where(rows == columns, start - 1.0, start)
                residual = product(low_tile, x_tile, product(high_tile, x_tile, start))
                x_tile[...] = residual.astype(jnp.bfloat16)
                plgpu.commit_smem()
                x = (x.astype(jnp.float32) - product(x, x_tile)).astype(jnp.bfloat16)
            x_tile[...] = x
            send([(x_tile, inverse[0].at[row, head, pl.ds(chunk * CHUNK, CHUNK)])])

        start = span * share + here
        ends = jnp.minimum((span + 1) * share, chunks)
        pl.when(start < ends)(lambda: bring(start))

        @pl.loop(0, turns)
        def _(turn):
            chunk = start + turn * workers
            pl.when(chunk < ends)(lambda: invert(chunk, chunk + workers))

        plgpu.wait_smem_to_gmem(0)

    results = launch(
        body,
        name="delta_rule_prepare",
        grid={"row": batch, "head": heads, "span": pl.cdiv(chunks, share)},
        inputs={"k": (k,), "vectors": (vectors,)},
        outputs={"inverse": (inverse,)},
        scratch=scratch,
        barriers=True,
        warpgroups=workers,
    )
    return results["inverse"][0]


def _joins(rows: jax.Array, columns: jax.Array, block: int) -> jax.Array:
    """Where the row is in an odd block and the column in the block before it."""
    rows, columns = (jax.lax.shift_right_logical(x, block.bit_length() - 1) for x in (rows, columns))
    return ((rows & 1) == 1) & (columns == rows - 1)


def forward(
    k: jax.Array,
    v: jax.Array | None,
    vectors: jax.Array,
    inverse: jax.Array,
    state: jax.Array,
    scale: float,
    stages: int,
    *,
    q: jax.Array | None,
    keeping: bool,
) -> dict[str, jax.Array]:
    """Walks through the chunks, with states transposed.

    Args:
      v: None for zeros.
      inverse: what `prepare` gives.
      state: (b, h, v, k), float32.
      stages: chunks of inputs under way or in use.
      q: None if the output is not needed.
      keeping: whether the states are.

    Returns:
      final: the state that leaves the last chunk.
      o: (b, t, h, v), bfloat16, the output; only if `q` is given.
      states: (b, h, chunks, v, k), bfloat16, those that enter the chunks; only if `keeping`.
    """
    _, heads, value_dim, _ = state.shape
    batch, time, groups, key_dim = k.shape
    sizes = Sizes(batch, time, heads, heads // groups, key_dim, value_dim)
    carried = jax.ShapeDtypeStruct((batch, heads, value_dim, key_dim), jnp.float32)
    inputs = {"k": (k,), "vectors": (vectors,), "inverse": (inverse,), "state": (state,)}
    outputs = {"final": (carried,)}
    scratch = {}
    if v is not None:
        inputs["v"] = (v,)
    if keeping:
        shape = (batch, heads, sizes.chunks, value_dim, key_dim)
        outputs["states"] = (jax.ShapeDtypeStruct(shape, jnp.bfloat16),)
        scratch["state_tile"] = matrices((sizes.blocks, BLOCK, key_dim), jnp.bfloat16)
    if q is not None:
        inputs["q"] = (q,)
        outputs["o"] = (jax.ShapeDtypeStruct((batch, time, heads, value_dim), jnp.bfloat16),)
        scratch["o_tile"] = matrices((sizes.blocks, CHUNK, BLOCK), jnp.bfloat16)
    scratch |= chain_scratch(sizes, stages, vectors.shape[-2], [name for name in inputs if name != "state"])

    def body(*, state, final, states=None, o=None, state_tile=None, o_tile=None, **refs):
        chain = Chain(sizes, stages, refs, scale)
        at, here = chain.at, chain.block

        def step(chunk, slot, state):
            tiles = chain.tiles(slot)
            vector = tiles["vectors"].at[1]
            into, beta = (along_columns(by_column(vector.at[kind])) for kind in (READ, BETA))
            rounded = state.astype(jnp.bfloat16)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if states is not None:
                state_tile.at[here][...] = rounded
                send([(state_tile.at[here], states[0].at[*at, chunk, chain.features])])
            seen = product(rounded, tiles["k"].T)
            error = read(tiles["v"].T) - seen * into if "v" in tiles else seen * (0.0 - into)
            written = product((error * beta).astype(jnp.bfloat16), tiles["inverse"].T)
            if o is not None:
                before = product(rounded, tiles["q"].T) * into * scale
                result = product(written.astype(jnp.bfloat16), tiles["scores"].T, before)
                o_tile.at[here].T[...] = result.astype(jnp.bfloat16)
                tokens = pl.ds(chunk * CHUNK, CHUNK)
                send([(o_tile.at[here], o[0].at[at[0], tokens, at[1], chain.features])])
            onward = (written * along_columns(by_column(vector.at[WRITE]))).astype(jnp.bfloat16)
            return product(onward, tiles["k"], state * vector[READ, CHUNK - 1])

        def walk():
            last = chain.walk(step, chain.enter(state[0]))
            final[0].at[*at, chain.features][...] = last
            plgpu.wait_smem_to_gmem(0)

        chain.run(walk)

    results = launch(
        body,
        name="delta_rule_states" if q is None else "delta_rule",
        grid={"row": batch, "head": heads},
        inputs=inputs,
        outputs=outputs,
        scratch=scratch,
        barriers=True,
        warpgroups=sizes.blocks + 1,
    )
    return {name: result[0] for name, result in results.items()}


def chain_scratch(sizes: Sizes, stages: int, kinds: int, names: list[str]) -> dict[str, Any]:
    """Shared memory of the inputs of `stages` chunks, of `scores` if q is one of them, and barriers."""
    shapes = {
        **dict.fromkeys(("q", "k"), (CHUNK, sizes.key_dim)),
        **dict.fromkeys(("v", "do"), (sizes.blocks, CHUNK, BLOCK)),
        **dict.fromkeys(("inverse", "scores"), SQUARE),
    }
    made = ["scores"] if "q" in names else []
    tiles = {
        f"{name}_tiles": matrices((stages, *shapes[name]), jnp.bfloat16)
        for name in names + made
        if name != "vectors"
    }
    tiles["vectors_tiles"] = plgpu.SMEM((stages, 2, kinds, CHUNK), jnp.float32)
    copies = sum({"v": sizes.blocks, "do": sizes.blocks, "vectors": 2}.get(name, 1) for name in names)
    return tiles | {
        "arrived": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        "made": plgpu.Barrier(num_arrivals=1, num_barriers=stages),
        "used": plgpu.Barrier(num_arrivals=sizes.blocks, num_barriers=stages),
        "done": plgpu.Barrier(num_arrivals=sizes.blocks + 1),
    }


class Chain:
    """A warpgroup at the chunks of a row and head: one of those that walk, or the last of the block, which serves them.

    That one fetches the chunks and makes what depends on no state: G in the place of T and, if there are queries, P.
    """

    def __init__(
        self, sizes: Sizes, stages: int, refs: dict[str, Any], scale: float, *, reverse: bool = False
    ):
        self._sizes, self._stages, self._scale, self._reverse = sizes, stages, scale, reverse
        names = ("arrived", "made", "used", "done")
        self._arrived, self._made, self._used, self._done = (refs.pop(name) for name in names)
        self._tiles = {name.removesuffix("_tiles"): refs[name] for name in refs if name.endswith("_tiles")}
        self._sources = {name: refs[name][0] for name in self._tiles if name != "scores"}
        self.at = jax.lax.axis_index("row"), jax.lax.axis_index("head")
        self.block = jax.lax.axis_index("warpgroup")
        self.features = pl.ds(self.block * BLOCK, BLOCK)

    def run(self, walk: Any) -> None:
        """Runs `walk`, which calls `self.walk`, beside the warpgroup that serves, and ends with all of them."""
        blocks = self._sizes.blocks
        limited = blocks == 2  # three warpgroups start with 168 registers a lane

        @pl.when(self.block == blocks)
        def _():
            if limited:
                plgpu.set_max_registers(SERVING, action="decrease")
            self._serve()

        @pl.when(self.block < blocks)
        def _():
            if limited:
                plgpu.set_max_registers(WALKING, action="increase")
            walk()

        plgpu.barrier_arrive(self._done)
        plgpu.barrier_wait(self._done)

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

    def walk(self, step: Any, carry: Any) -> Any:
        """Runs `step(chunk, slot, carry)`, which must have waited for its products; not for copies out."""

        def go(turn, carry):
            slot = jax.lax.rem(turn, self._stages)
            plgpu.barrier_wait(self._arrived.at[slot])
            plgpu.barrier_wait(self._made.at[slot])
            carry = step(self._place(turn), slot, carry)
            plgpu.commit_smem()  # what this warpgroup read here, a copy may now overwrite
            plgpu.barrier_arrive(self._used.at[slot])
            return carry

        return jax.lax.fori_loop(0, self._sizes.chunks, go, carry)

    def _place(self, turn: Any) -> Any:
        return self._sizes.chunks - 1 - turn if self._reverse else turn

    def _serve(self) -> None:
        stages, chunks = self._stages, self._sizes.chunks
        pl.loop(0, min(stages, chunks))(lambda turn: self._bring(turn, turn))

        @pl.loop(0, chunks)
        def _(turn):
            before = turn - 1
            slot = jax.lax.rem(turn, stages)

            def refill():
                @pl.when((turn > 0) & (before + stages < chunks))
                def _():
                    old = jax.lax.rem(before, stages)
                    plgpu.barrier_wait(self._used.at[old])
                    self._bring(before + stages, old)

            if stages == 1:
                refill()
            plgpu.barrier_wait(self._arrived.at[slot])
            self._make(slot)
            plgpu.commit_smem()
            plgpu.barrier_arrive(self._made.at[slot])
            if stages > 1:  # while the others are at the chunk that was made just now
                refill()

        for turn in range(
            max(chunks - stages, 0), chunks
        ):  # every turn of a barrier must have been waited for
            plgpu.barrier_wait(self._used.at[turn % stages])

    def _make(self, slot: Any) -> None:
        tiles = {name: ref.at[slot] for name, ref in self._tiles.items()}
        decay = decay_matrix(tiles["vectors"], *places())
        tiles["inverse"][...] = (read(tiles["inverse"]) * decay).astype(jnp.bfloat16)
        if "scores" in tiles:
            scores = product(tiles["q"], tiles["k"].T) * decay * self._scale
            tiles["scores"][...] = scores.astype(jnp.bfloat16)

    def _bring(self, turn: Any, slot: Any) -> None:
        (row, head), sizes = self.at, self._sizes
        chunk = self._place(turn)
        tokens, shared = pl.ds(chunk * CHUNK, CHUNK), jax.lax.div(head, sizes.group)
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
                pairs += [(source.at[row, head, chunk], target.at[i]) for i in range(2)]
            else:
                pairs.append((source.at[row, head, tokens], target))
        fetch(pairs, self._arrived.at[slot])
