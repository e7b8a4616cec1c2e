"""The Mosaic GPU kernel of `gated_linear_attention` with a decay per key channel, backward: gradients of q, k and decay.

With the notation of channel_walk.py, the states S entering and the gradients R of the states leaving all chunks are known.
Every chunk then stands alone:

    dP = scale do v^T,    dq = scale b do S^T + ...,    dk = w v R^T + ....

What is missing are the pairs of steps inside the chunk. Each level (channel_levels.py) takes the pairs that it splits, in both
orders, out of the symmetric matrix D = dP + dP^T. With its tile X of decayed queries and keys, and their decays F, the rows of
F o (D X) are gradients of q in second blocks and of k in first blocks.

The exponents of X are sums of log-decay. Their gradient is X o (D X), a term of dq . q or of dk . k, so a log-decay gathers
dq . q - dk . k from its step to the end of the chunk. Pairs of two such steps cancel in this sum, because both terms come from
the same rounded factors. What the chunk writes decays from after each step, and the state over the whole chunk, so these
terms are summed over earlier steps and over values without such cancellation.
"""

import jax
import jax.numpy as jnp

from layers.kernels.gated_linear_attention.gpu import channel_levels as levels
from layers.kernels.gated_linear_attention.gpu.channel_kernels import ROWS, read
from layers.kernels.gated_linear_attention.gpu.channel_levels import READS, SQUARE, WRITES
from layers.kernels.gated_linear_attention.gpu.kernels import CHUNK, PART, shared_head
from layers.kernels.mosaic_gpu import (
    along,
    exp2,
    in_registers,
    indices,
    launch,
    matrices,
    pl,
    plgpu,
    product,
    products,
    spread,
)


def gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    g: jax.Array,
    vectors: jax.Array | None,
    keep: jax.Array,
    states: jax.Array,
    dstates: jax.Array,
    scale: float,
) -> dict[str, jax.Array]:
    """Returns dq and dk, (b, t, h, k), bfloat16, and dg, (b, t, h, k), float32.

    Args:
      q, k, v, do: (b, t, heads, width), bfloat16, t a multiple of 8, widths of 64.
      g: (b, t, h, k), log-decay, float32.
      vectors: see `channel_levels.vectors`.
      keep: what `channel_kernels.prepare` returns.
      states, dstates: (b, h, n, k, v), bfloat16: the states that enter chunks, and the gradients of those that leave them.
    """
    batch, time, heads, keys = g.shape
    width, chunks = v.shape[3], keep.shape[2]
    parts, blocks = keys // PART, width // PART
    inputs = {
        "q": q,
        "k": k,
        "v": v,
        "do": do,
        "g": g,
        "keep": keep,
        "states": states,
        "dstates": dstates,
    }
    scratch = {
        "v_tiles": matrices((blocks, *SQUARE), v.dtype),
        "do_tiles": matrices((blocks, *SQUARE), do.dtype),
        "q_tile": matrices(SQUARE, q.dtype),
        "k_tile": matrices(SQUARE, k.dtype),
        "g_tile": matrices(SQUARE, jnp.float32),
        # States and their gradients; when they have been used, decays and X.
        "tiles": matrices((max(2 * blocks, 3), *SQUARE), jnp.bfloat16),
        "keep_tile": plgpu.SMEM((PART,), jnp.float32),
        "passed_tile": plgpu.SMEM((PART,), jnp.float32),
        "arrived": plgpu.Barrier(num_arrivals=2 * blocks + (vectors is not None)),
        "part_arrived": plgpu.Barrier(num_arrivals=4 + 2 * blocks),
    }
    if vectors is not None:
        inputs["vectors"] = vectors
        scratch["numbers"] = plgpu.SMEM(vectors.shape[2:], jnp.float32)

    def body(
        *,
        q,
        k,
        v,
        do,
        g,
        keep,
        states,
        dstates,
        dq,
        dk,
        dg,
        v_tiles,
        do_tiles,
        q_tile,
        k_tile,
        g_tile,
        tiles,
        keep_tile,
        passed_tile,
        arrived,
        part_arrived,
        vectors=None,
        numbers=None,
    ):
        row, head, chunk = (jax.lax.axis_index(name) for name in ("row", "head", "chunk"))
        steps = pl.ds(chunk * CHUNK, CHUNK)
        high, low, x_tile = (tiles.at[i] for i in range(3))
        state_tiles = [tiles.at[block] for block in range(blocks)]
        dstate_tiles = [tiles.at[blocks + block] for block in range(blocks)]

        def over_blocks(left, right):
            """x y^T, both cut into blocks of values."""
            return products((tuple((x, y.T) for x, y in zip(left, right, strict=True)),))[0]

        def bring(part):
            lanes = pl.ds(part * PART, PART)
            for source, target in ((q, q_tile), (k, k_tile), (g, g_tile)):
                at = shared_head(head, heads, source.shape[2])
                plgpu.copy_gmem_to_smem(source.at[row, steps, at, lanes], target, part_arrived)
            plgpu.copy_gmem_to_smem(keep.at[row, head, chunk, ROWS - 1, lanes], keep_tile, part_arrived)
            for source, targets in ((states, state_tiles), (dstates, dstate_tiles)):
                for block, target in enumerate(targets):
                    of_block = source.at[row, head, chunk, lanes, pl.ds(block * PART, PART)]
                    plgpu.copy_gmem_to_smem(of_block, target, part_arrived)

        for source, targets in ((v, v_tiles), (do, do_tiles)):
            at = shared_head(head, heads, source.shape[2])
            for block in range(blocks):
                of_block = source.at[row, steps, at, pl.ds(block * PART, PART)]
                plgpu.copy_gmem_to_smem(of_block, targets.at[block], arrived)
        if vectors is not None:
            plgpu.copy_gmem_to_smem(vectors.at[row, chunk], numbers, arrived)
        bring(0)
        plgpu.barrier_wait(arrived)

        i, j = indices(SQUARE, 0), indices(SQUARE, 1)
        do_blocks = [do_tiles.at[block] for block in range(blocks)]
        v_blocks = [v_tiles.at[block] for block in range(blocks)]
        dscores, swapped = over_blocks(do_blocks, v_blocks), over_blocks(v_blocks, do_blocks)
        dscores = levels.same(numbers, scale * jnp.where(i >= j, dscores, swapped))
        dscores = dscores.astype(jnp.bfloat16)

        def scored(pairs):
            """D for some pairs, as an operand of a product."""
            return jnp.where(pairs, dscores.astype(jnp.float32), 0.0).astype(jnp.bfloat16)

        @pl.loop(0, parts)
        def _(part):
            lanes = pl.ds(part * PART, PART)
            plgpu.barrier_wait(part_arrived)
            dqueries, dkeys = over_blocks(do_blocks, state_tiles), over_blocks(v_blocks, dstate_tiles)
            passed = 0.0
            for state, dstate in zip(state_tiles, dstate_tiles, strict=True):
                passed = passed + (read(state) * read(dstate)).sum(axis=1)
            passed_tile[...] = passed * along(keep_tile, 0)
            plgpu.commit_smem()
            levels.split(g_tile, high, low)
            plgpu.commit_smem()
            # Steps that read or write no other chunk's state may meet one that is infinite.
            before, after = exp2(levels.sums_before(high, low)), exp2(levels.sums_after(high, low))
            dqueries = levels.only(numbers, READS, scale * dqueries * before)
            dkeys = levels.only(numbers, WRITES, dkeys * after)
            ddecay = dqueries * read(q_tile)
            written = dkeys * read(k_tile)
            x_tile[...] = written.astype(jnp.bfloat16)
            plgpu.commit_smem()
            earlier = levels.masked_sums(j < i, (x_tile,))
            g_tile[...] = earlier + spread(along(passed_tile, 1), 1, SQUARE)
            own = scored(i == j)
            dqueries = dqueries + product(own, k_tile)
            dkeys = dkeys + product(own, q_tile)

            def level_gradients(level, sums):
                dqueries, dkeys, ddecay = sums
                decay = exp2(levels.level_sums(level, high, low))
                later = levels.second(level)
                taken = (jnp.where(later, read(q_tile), read(k_tile)) * decay).astype(jnp.bfloat16)
                x_tile[...] = taken
                plgpu.commit_smem()
                crossed = product(scored(levels.pairs(level)), x_tile)
                dtaken = crossed * decay
                exponent = taken.astype(jnp.float32) * crossed
                return (
                    dqueries + jnp.where(later, dtaken, 0.0),
                    dkeys + jnp.where(later, 0.0, dtaken),
                    ddecay + jnp.where(later, exponent, 0.0 - exponent),
                )

            sums = levels.accumulated(level_gradients, (dqueries, dkeys, ddecay))
            dqueries, dkeys, ddecay = sums
            rounded = ddecay.astype(jnp.bfloat16)
            high[...] = rounded
            low[...] = (ddecay - rounded.astype(jnp.float32)).astype(jnp.bfloat16)
            q_tile[...] = dqueries.astype(dq.dtype)
            k_tile[...] = dkeys.astype(dk.dtype)
            plgpu.commit_smem()
            later = levels.masked_sums(j >= i, (high, low))
            g_tile[...] = later + in_registers(g_tile)
            plgpu.commit_smem()
            for tile, target in ((q_tile, dq), (k_tile, dk), (g_tile, dg)):
                plgpu.copy_smem_to_gmem(tile, target.at[row, steps, head, lanes])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            pl.when(part + 1 < parts)(lambda: bring(part + 1))

        plgpu.wait_smem_to_gmem(0)

    shape = (batch, time, heads, keys)
    return launch(
        body,
        name="gated_linear_attention_channels_gradients",
        grid={"row": batch, "head": heads, "chunk": chunks},
        inputs=inputs,
        outputs={
            "dq": jax.ShapeDtypeStruct(shape, q.dtype),
            "dk": jax.ShapeDtypeStruct(shape, k.dtype),
            "dg": jax.ShapeDtypeStruct(shape, jnp.float32),
        },
        scratch=scratch,
        barriers=True,
    )
