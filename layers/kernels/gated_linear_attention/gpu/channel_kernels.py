"""The Mosaic GPU kernel of `gated_linear_attention` with a decay per key channel that prepares chunks for the walk.

In chunks of 64 steps, entered by the state S, with b the decay from the start of the chunk and w that to its end,

    o = (scale q b) S + P v,    S' = a S + (k w)^T v,    P_ij = scale sum_d q_id k_jd decay_d(j -> i).

`prepare` computes P, the reading queries scale q b, the writing keys k w and a, the decay over the chunk, for all chunks at
once. channel_walk.py carries S through the chunks.

At 8 x 4096 tokens and 16 heads of 128 in bfloat16 with float32 decay, it moves 0.9 GB, 0.3 ms at 3.0 TB/s. The chunks take
65536 exponentials each, 0.15 ms of the special function units.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from layers.kernels.gated_linear_attention.gpu import channel_levels as levels
from layers.kernels.gated_linear_attention.gpu.channel_levels import KEEPS, READS, SQUARE, WRITES
from layers.kernels.gated_linear_attention.gpu.kernels import CHUNK, PART, shared_head, together
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
    spread,
)

ROWS = 8  # rows of `keep`, the smallest tile that a copy takes; the last holds the decay over the chunk
PROCESSORS = 132  # of an H100


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the kernels are laid out.

    Attributes:
      workers: warpgroups per program of `prepare`, each at its own chunk.
      turns: chunks that a warpgroup of `prepare` takes in turn, at most.
      stages: chunks of inputs of `walk` in shared memory, in flight or in use.
    """

    workers: int = 3
    turns: int = 4
    stages: int = 2


def prepare(
    q: jax.Array,
    k: jax.Array,
    g: jax.Array,
    vectors: jax.Array | None,
    scale: float,
    settings: Settings,
) -> dict[str, jax.Array]:
    """Returns what the walks need of queries, keys and decays.

    Args:
      q, k: (b, t, heads, k), bfloat16, t a multiple of 8, widths of 64.
      g: (b, t, h, k), log-decay, float32.
      vectors: see `channel_levels.vectors`.

    Returns:
      reading, writing: (b, t, h, k), bfloat16, decayed queries and keys.
      weights: (b, h, n * c, c), bfloat16, P.
      keep: (b, h, n, ROWS, k), float32, the decay over the chunk in the last row.
    """
    batch, time, heads, keys = g.shape
    chunks, parts = pl.cdiv(time, CHUNK), keys // PART
    workers = min(settings.workers, chunks)
    turns = max(1, min(settings.turns, batch * heads * chunks // (workers * 4 * PROCESSORS)))
    share = workers * turns
    inputs = {"q": q, "k": k, "g": g}
    scratch = {
        **{f"{name}_tile": matrices((workers, *SQUARE), jnp.bfloat16) for name in ("q", "k")},
        **{f"{name}_tile": matrices((workers, *SQUARE), jnp.bfloat16) for name in ("high", "low", "x")},
        "g_tile": matrices((workers, *SQUARE), jnp.float32),
        "arrived": plgpu.Barrier(num_arrivals=3 + (vectors is not None), num_barriers=workers),
        "done": plgpu.Barrier(num_arrivals=workers),
    }
    if vectors is not None:
        inputs["vectors"] = vectors
        scratch["vector_tile"] = plgpu.SMEM((workers, *vectors.shape[2:]), jnp.float32)

    def body(
        *,
        q,
        k,
        g,
        reading,
        writing,
        weights,
        keep,
        arrived,
        done,
        vectors=None,
        vector_tile=None,
        **tiles,
    ):
        row, head, span, here = (jax.lax.axis_index(x) for x in ("row", "head", "span", "warpgroup"))
        names = ("q", "k", "g", "high", "low", "x")
        q_tile, k_tile, g_tile, high, low, x_tile = (tiles[f"{name}_tile"].at[here] for name in names)
        numbers = None if vectors is None else vector_tile.at[here]

        def bring(chunk, part):
            steps, lanes = pl.ds(chunk * CHUNK, CHUNK), pl.ds(part * PART, PART)
            for source, target in ((q, q_tile), (k, k_tile), (g, g_tile)):
                at = shared_head(head, heads, source.shape[2])
                plgpu.copy_gmem_to_smem(source.at[row, steps, at, lanes], target, arrived.at[here])
            if vectors is not None:
                plgpu.copy_gmem_to_smem(vectors.at[row, chunk], numbers, arrived.at[here])

        def of_part(chunk, part, scores):
            """Adds the scores of a part of the keys, and sends the decayed queries and keys."""
            plgpu.barrier_wait(arrived.at[here])
            levels.split(g_tile, high, low)
            plgpu.commit_smem()
            own = product(q_tile, k_tile.T)
            scores = scores + jnp.where(indices(SQUARE, 0) == indices(SQUARE, 1), own, 0.0)

            def join(level, scores):
                decay = exp2(levels.level_sums(level, high, low))
                taken = jnp.where(levels.second(level), read(q_tile), read(k_tile))
                x_tile[...] = (taken * decay).astype(jnp.bfloat16)
                plgpu.commit_smem()
                joined = product(x_tile, x_tile.T)
                return scores + jnp.where(levels.pairs(level), joined, 0.0)

            scores = levels.accumulated(join, scores)
            before = exp2(levels.sums_before(high, low))
            passing = before
            if vectors is not None:
                flags = spread(along(numbers.at[KEEPS], 0), 0, SQUARE)
                passing = jnp.where(flags > 0.0, before, 0.0)
            g_tile[...] = passing
            q_tile[...] = levels.only(numbers, READS, scale * read(q_tile) * before).astype(q.dtype)
            after = exp2(levels.sums_after(high, low))
            k_tile[...] = levels.only(numbers, WRITES, read(k_tile) * after).astype(k.dtype)
            plgpu.commit_smem()
            steps, lanes = pl.ds(chunk * CHUNK, CHUNK), pl.ds(part * PART, PART)
            plgpu.copy_smem_to_gmem(q_tile, reading.at[row, steps, head, lanes])
            plgpu.copy_smem_to_gmem(k_tile, writing.at[row, steps, head, lanes])
            last = g_tile.at[pl.ds(CHUNK - ROWS, ROWS)]
            plgpu.copy_smem_to_gmem(last, keep.at[row, head, chunk, :, lanes])
            return scores

        def of_chunk(chunk):
            def add(part, scores):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                bring(chunk, part)
                return of_part(chunk, part, scores)

            scores = plgpu.layout_cast(jnp.zeros(SQUARE, jnp.float32), plgpu.Layout.WGMMA)
            scores = jax.lax.fori_loop(0, parts, add, scores)
            x_tile[...] = levels.same(numbers, lower(scale * scores)).astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(x_tile, weights.at[row, head, pl.ds(chunk * CHUNK, CHUNK)])

        start = span * share + here

        @pl.loop(0, turns)
        def _(turn):
            chunk = start + turn * workers
            pl.when(chunk < chunks)(lambda: of_chunk(chunk))

        plgpu.wait_smem_to_gmem(0)
        together(done)

    decayed = jax.ShapeDtypeStruct((batch, time, heads, keys), q.dtype)
    return launch(
        body,
        name="gated_linear_attention_channels_prepare",
        grid={"row": batch, "head": heads, "span": pl.cdiv(chunks, share)},
        inputs=inputs,
        outputs={
            "reading": decayed,
            "writing": decayed,
            "weights": jax.ShapeDtypeStruct((batch, heads, chunks * CHUNK, CHUNK), jnp.bfloat16),
            "keep": jax.ShapeDtypeStruct((batch, heads, chunks, ROWS, keys), jnp.float32),
        },
        scratch=scratch,
        barriers=True,
        warpgroups=workers,
    )


def lower(x: jax.Array) -> jax.Array:
    """The entries (c, c) of pairs of a step and one that is not later, 0 elsewhere."""
    return jnp.where(indices(SQUARE, 0) >= indices(SQUARE, 1), x, 0.0)


def read(ref: Any) -> jax.Array:
    """A tile of shared memory in float32 registers."""
    return in_registers(ref).astype(jnp.float32)
