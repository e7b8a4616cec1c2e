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
    prepare                  0.13 GB   0.07 GB     0.07 ms      0.16 ms
    forward                  0.47 GB   0.13 GB     0.20 ms      0.19 ms
    forward, states alone    0.34 GB   0.27 GB     0.20 ms      0.11 ms

The products of `prepare` are a chain, of 64 x 64 each, in which a warpgroup waits for itself; warpgroups for several chunks are
on every processor. It took 0.16 ms of the 0.42 that an H100 took for all, 2.3 times the floor of the primitive. Compiled for
Hopper it has 1500 instructions a chunk and no spills, where it had 2340 and 52 bytes a lane: entries come to X as bits behind a
mask, not by comparing places at every level, and pairs of bfloat16 are not converted one by one. That gained 0.01 ms, so
instructions were not what it waits for; the H100 takes 0.41 (2.2 times the floor) with and without decay. An H200 (4.1 TB/s)
took 0.37 ms before that, 0.34 without the refinement of inverses, 0.39 with two of them, with two stages or with two workers.
An H100 took 0.52 ms when `prepare` made G and P as well (1.07 GB in all, not 0.8), one chunk a block, and registers let two
blocks run on a processor. What is left is the wait of 64 chunks for each other: a row and head has one block to walk it. To
have the walk's k S and q S under way together, and then o and the next S, did not change its time.
"""

import jax
import jax.numpy as jnp
import numpy as np

from layers.kernels.delta_rule.gpu.chain import Chain, chain_scratch
from layers.kernels.delta_rule.gpu.tiles import (
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
    fetch,
    in_turn,
    indices,
    read,
    send,
    visible,
    wait_to_send,
)
from layers.kernels.mosaic_gpu import in_registers, launch, matrices, pl, plgpu, product
from layers.kernels.shard_map_types import vary_as


def _masks() -> np.ndarray:
    """All bits set where a level of the inversion puts entries of X, (levels, c, c): the diagonal and the first, the others."""
    row, column = np.indices(SQUARE)
    levels = [
        ((row >> level) & 1 == 1) & (column >> level == (row >> level) - 1)
        for level in range(CHUNK.bit_length() - 1)
    ]
    levels[0] |= row == column
    return np.where(levels, -1, 0).astype(np.int16)


_MASKS = _masks()
TURNS = 4  # chunks that a warpgroup of `prepare` inverts, at most


def prepare(k: jax.Array, vectors: jax.Array, refinements: int, workers: int) -> jax.Array:
    """The inverse T of every chunk, (b, h, chunks * c, c), bfloat16.

    Every warpgroup inverts some chunks, each a chain of small products in which it mostly waits: blocks have several of
    them. What a chunk needs comes while the one before is inverted.

    Args:
      workers: warpgroups of a block. Four leave each lane 128 registers.
      refinements: steps of Newton's method, X <- X - X ((I + A) X - I), with X rounded and A the sum of two rounded
        matrices. Rounding in the products before leaves a twentieth of T wrong where beta is near 2 and keys are alike.
        After one step that is 2e-3 to 3e-3, after two 1.5e-3, as much as rounding T to bfloat16 leaves wrong. One is enough:
        with beta up to 1.9 and keys at a cosine of up to 0.8, outputs and gradients are no further from float64 than with
        two, nor than XLA's; without any they are up to three times as far.
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
        "mask_tiles": matrices(_MASKS.shape, jnp.int16),
        "vector_tiles": plgpu.SMEM((workers, 2, kinds, CHUNK), jnp.float32),
        "masked": plgpu.Barrier(),
        "arrived": plgpu.Barrier(num_arrivals=3, num_barriers=workers),
        "done": plgpu.Barrier(num_arrivals=workers),
    }

    def body(
        *,
        k,
        vectors,
        masks,
        inverse,
        k_tiles,
        x_tiles,
        high_tiles,
        low_tiles,
        mask_tiles,
        vector_tiles,
        **barriers,
    ):
        masked, arrived, done = (barriers[name] for name in ("masked", "arrived", "done"))
        row, head, span, here = (jax.lax.axis_index(x) for x in ("row", "head", "span", "warpgroup"))
        shared = jax.lax.div(head, heads // groups)

        def bring(chunk):
            numbers = [(vectors.at[row, head, chunk], vector_tiles.at[here, i]) for i in range(2)]
            keys = k.at[row, pl.ds(chunk * CHUNK, CHUNK), shared]
            fetch([(keys, k_tiles.at[here]), *numbers], arrived.at[here])

        def invert(chunk, after):
            # As in `chunk_gradients`, what depends on the place of tiles is to be computed where it is used.
            tiles = (k_tiles, x_tiles, high_tiles, low_tiles, vector_tiles)
            own = jax.lax.optimization_barrier(here)
            k_tile, x_tile, high_tile, low_tile, vector_tile = (ref.at[own] for ref in tiles)
            plgpu.barrier_wait(arrived.at[here])
            rows, columns = indices()
            products = product(k_tile, k_tile.T) * along_rows(by_row(vector_tile.at[0, BETA]))
            whole = jnp.where(rows == columns, -1.0, 0.0)  # A - I
            whole = jnp.where(visible(vector_tile, rows > columns), products, whole)
            high = _rounded(whole)
            high_tile[...] = high
            low_tile[...] = (whole - high.astype(jnp.float32)).astype(jnp.bfloat16)
            plgpu.commit_smem()
            pl.when(after < ends)(lambda: bring(after))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            # Of -X: it grows by X L X, which is (-X)(A - I)(-X) where a level adds entries. Elsewhere they are masked, and
            # where it adds them there were zeros, so that bits can be put together.
            x = _bits(high) & in_registers(mask_tiles.at[0])
            for level in range(1, len(_MASKS)):
                x_tile[...] = _from_bits(x)
                plgpu.commit_smem()
                joined = product(_rounded(product(_from_bits(x), high_tile)), x_tile)
                x |= _bits(_rounded(joined)) & in_registers(mask_tiles.at[level])
            x = _from_bits(x)
            for _ in range(refinements):  # -X <- -2 X + (-X) ((A - I) (-X) + 2 (-X))
                x_tile[...] = x
                plgpu.commit_smem()
                residual = product(low_tile, x_tile, product(high_tile, x_tile, 2.0 * read(x_tile)))
                twice = 2.0 * read(x_tile)
                plgpu.commit_smem()
                x_tile[...] = residual.astype(jnp.bfloat16)
                plgpu.commit_smem()
                x = _rounded(product(x, x_tile, twice))
            x_tile[...] = 0.0 - x
            send([(x_tile, inverse.at[row, head, pl.ds(chunk * CHUNK, CHUNK)])])

        start = span * share + here
        ends = jnp.minimum((span + 1) * share, chunks)
        pl.when(start < ends)(lambda: bring(start))
        pl.when(here == 0)(lambda: fetch([(masks, mask_tiles)], masked))
        plgpu.barrier_wait(masked)

        @pl.loop(0, turns)
        def _(turn):
            chunk = start + turn * workers
            pl.when(chunk < ends)(lambda: invert(chunk, chunk + workers))

        plgpu.wait_smem_to_gmem(0)
        # A warpgroup that ends while another multiplies can break off the kernel.
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

    return launch(
        body,
        name="delta_rule_prepare",
        grid={"row": batch, "head": heads, "span": pl.cdiv(chunks, share)},
        inputs={"k": k, "vectors": vectors, "masks": vary_as(jnp.asarray(_MASKS), k)},
        outputs={"inverse": inverse},
        scratch=scratch,
        barriers=True,
        warpgroups=workers,
    )["inverse"]


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int16)


def _from_bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16)


def _rounded(x: jax.Array) -> jax.Array:
    """To bfloat16, two numbers at once: without the barrier the compiler splits pairs that are used as float32 again."""
    return jax.lax.optimization_barrier(x.astype(jnp.bfloat16))


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
    inputs = {"k": k, "vectors": vectors, "inverse": inverse, "state": state}
    outputs = {"final": carried}
    scratch = {}
    if v is not None:
        inputs["v"] = v
    if keeping:
        shape = (batch, heads, sizes.chunks, value_dim, key_dim)
        outputs["states"] = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        scratch["state_tile"] = matrices((sizes.blocks, BLOCK, key_dim), jnp.bfloat16)
    if q is not None:
        inputs["q"] = q
        outputs["o"] = jax.ShapeDtypeStruct((batch, time, heads, value_dim), jnp.bfloat16)
        scratch["o_tile"] = matrices((sizes.blocks, CHUNK, BLOCK), jnp.bfloat16)
    scratch |= chain_scratch(sizes, stages, vectors.shape[-2], [name for name in inputs if name != "state"])

    def body(*, state, final, states=None, o=None, state_tile=None, o_tile=None, **refs):
        chain = Chain(sizes, stages, refs, scale)
        at, here = chain.at, chain.block
        kinds = (states is not None) + (o is not None)

        def step(chunk, slot, state):
            tiles = chain.tiles(slot)
            vector = tiles["vectors"].at[1]
            into, beta = (along_columns(by_column(vector.at[kind])) for kind in (READ, BETA))
            rounded = state.astype(jnp.bfloat16)
            if states is not None:
                wait_to_send(kinds)
                state_tile.at[here][...] = rounded
                send([(state_tile.at[here], states.at[*at, chunk, chain.features])])
            seen = product(rounded, tiles["k"].T)
            error = read(tiles["v"].T) - seen * into if "v" in tiles else seen * (0.0 - into)
            written = product((error * beta).astype(jnp.bfloat16), tiles["inverse"].T)
            if o is not None:
                before = product(rounded, tiles["q"].T) * into * scale
                result = product(written.astype(jnp.bfloat16), tiles["scores"].T, before)
                wait_to_send(kinds)
                o_tile.at[here].T[...] = result.astype(jnp.bfloat16)
                tokens = pl.ds(chunk * CHUNK, CHUNK)
                send([(o_tile.at[here], o.at[at[0], tokens, at[1], chain.features])])
            onward = (written * along_columns(by_column(vector.at[WRITE]))).astype(jnp.bfloat16)
            return product(onward, tiles["k"], state * vector[READ, CHUNK - 1])

        def walk():
            last = chain.walk(step, chain.enter(state))
            final.at[*at, chain.features][...] = last
            plgpu.wait_smem_to_gmem(0)

        chain.run(walk)

    return launch(
        body,
        name="delta_rule_states" if q is None else "delta_rule",
        grid={"row": batch, "head": heads},
        inputs=inputs,
        outputs=outputs,
        scratch=scratch,
        barriers=True,
        warpgroups=sizes.blocks + 1,
    )
