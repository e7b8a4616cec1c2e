"""The Hopper kernels of `delta_rule`'s forward pass, which its backward pass uses too.

In a chunk of c tokens entered by the state S, with D the decay from token j to token i >= j,

    T = (I + A)^-1,   A_ij = beta_i k_i.k_j for j < i,      G = T o D,
    y = G beta (v - r k S),   o = scale r q S + P y,   P = scale (q k^T) o D,   S <- total S + (w k)^T y,

where r decays from the state that enters and w to the state that leaves. The decay has no part in T, because it changes
A by a diagonal similarity: (I + A o D)^-1 = T o D. `prepare` computes T for all chunks at once. T grows from the diagonal,
X <- X - X L X with L the entries of A that join two neighbouring blocks of 1, 2, 4, ... tokens. `forward` walks through the
chunks of a row and head. Each of its warpgroups holds S^T for 64 features of the values in registers. Every product of a
chunk takes it from there, transposed, so that only inputs pass through shared memory. One more warpgroup fetches the chunks
and computes their G and P ahead of the walk.

At 8 x 4096 tokens, 16 heads of 128, bfloat16, at 3.0 TB/s and 400 TFLOP/s:

                             read      written       bytes     products
    prepare                  0.13 GB   0.07 GB     0.07 ms      0.16 ms
    forward                  0.47 GB   0.13 GB     0.20 ms      0.19 ms
    forward, states alone    0.34 GB   0.27 GB     0.20 ms      0.11 ms

The products of `prepare` form a chain of 64 x 64 products, in which a warpgroup waits for itself; every multiprocessor
therefore runs warpgroups for several chunks. `forward` is bound by the wait of 64 chunks for each other, since one program
walks each row and head.
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
    """Bits set where a level of the inversion puts entries of X, (levels, c, c): the diagonal and the first, the others."""
    row, column = np.indices(SQUARE)
    levels = [
        ((row >> level) & 1 == 1) & (column >> level == (row >> level) - 1)
        for level in range(CHUNK.bit_length() - 1)
    ]
    levels[0] |= row == column
    return np.where(levels, -1, 0).astype(np.int16)


_MASKS = _masks()
TURNS = 4  # chunks per warpgroup of `prepare`, at most


def prepare(k: jax.Array, vectors: jax.Array, refinements: int, workers: int) -> jax.Array:
    """Returns the inverse T of every chunk, (b, h, chunks * c, c), bfloat16.

    Every warpgroup inverts some chunks. Each inversion is a chain of small products in which the warpgroup mostly waits, so
    programs have several warpgroups. The inputs of a chunk arrive while the chunk before is inverted.

    Args:
      workers: warpgroups per program. Four leave each lane 128 registers.
      refinements: steps of Newton's method, X <- X - X ((I + A) X - I), with X rounded and A the sum of two rounded
        matrices. Without them, rounding leaves a twentieth of T wrong where beta is near 2 and keys are alike. One step
        leaves 2e-3 to 3e-3; two leave 1.5e-3, as much as rounding T to bfloat16. One is enough: with beta up to 1.9 and
        keys at a cosine of up to 0.8, outputs and gradients are as close to float64 as with two, and as XLA's. Without
        any the error is up to three times as large.
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
            # As in `chunk_gradients`, what depends on the place of tiles must be computed where it is used.
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
            # This holds -X, which grows by X L X: (-X)(A - I)(-X) where a level adds entries, and masked elsewhere. The
            # entries that it adds to are zero, so that bits can be combined.
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
        # A warpgroup that ends while another multiplies can abort the kernel.
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
    """Rounds to bfloat16, two numbers at once: without the barrier the compiler splits pairs that are used as float32."""
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
    """Returns the last state, outputs and states of a walk through the chunks, with states transposed.

    Args:
      v: None for zeros.
      inverse: what `prepare` returns.
      state: (b, h, v, k), float32.
      stages: chunks of inputs in flight or in use.
      q: None if the output is not needed.
      keeping: whether the states are needed.

    Returns:
      final: the state that leaves the last chunk.
      o: (b, t, h, v), bfloat16, the output; only if `q` is given.
      states: (b, h, chunks, v, k), bfloat16, the states that enter the chunks; only if `keeping`.
    """
    _, heads, value_dim, _ = state.shape
    batch, time, _, key_dim = k.shape
    sizes = Sizes(batch, time, heads, key_dim, value_dim)
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
