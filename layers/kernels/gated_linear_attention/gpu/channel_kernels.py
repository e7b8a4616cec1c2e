"""The Triton kernels of `gated_linear_attention` with a decay per key channel: scores, walks through chunks, and outputs.

In chunks of 64 steps, entered by the state S, with b the decay from the start of the chunk and w that to its end,

    o = (scale q b) S + P v,    S' = a S + (k w)^T v,    P_ij = scale sum_d q_id k_jd decay_d(j -> i).

With a bonus, b ends one step earlier.

`scores` computes P of all chunks at once, `walk` the states that enter the chunks, one after the other, and `outputs` the
outputs of all chunks. The backward pass walks from the last chunk with the roles of q b and k w exchanged,

    dv = (k w) R + P^T do,    R of the chunk before = a R + (scale q b)^T do,

with R the gradient of the state that leaves a chunk.
"""

from typing import Any

import jax
import jax.numpy as jnp

from layers.kernels.gated_linear_attention.gpu import channel_tiles as tiles
from layers.kernels.gated_linear_attention.gpu.channel_tiles import CHUNK, LEVELS, PART, Numbers
from layers.kernels.pallas_triton import launch, pl, pltriton


def scores(
    q: jax.Array, k: jax.Array, sums: jax.Array, bonus: jax.Array | None, numbers: Numbers, scale: float
) -> jax.Array:
    """Returns P, (b, n * c, h, c), bfloat16.

    Args:
      q, k: (b, t, heads, k), bfloat16.
      sums: (b, t, h, k), of log-decay, see `channel_tiles.sums`.
      bonus: (h, k), float32, or None.
    """
    batch, time, heads, keys = sums.shape
    chunks = pl.cdiv(time, CHUNK)

    def body(*, q, k, sums, bonus, weights, **segments):
        chunk, at = pl.program_id(0), pl.program_id(1)
        row, head, numbers = at // heads, at % heads, Numbers(**segments)
        step = jnp.arange(CHUNK)
        total = jnp.zeros((CHUNK, CHUNK), jnp.float32)
        for lane in range(0, keys, PART):
            place = tiles.Place(row, chunk, head, lane)
            queries, keys_, decay = (
                tiles.load(x, row, chunk * CHUNK, tiles.shared(x, head, heads), lane).astype(jnp.float32)
                for x in (q, k, sums)
            )
            before, own = decay, queries * keys_
            if bonus is not None:
                before = tiles.sums_before(sums, place)
                own = own * tiles.bonus_of(bonus, head, lane)
            total = total + jnp.where(step[:, None] == step[None], own.sum(1)[:, None], 0.0)
            for level in range(LEVELS):
                taken = jnp.where(tiles.second(level), queries, keys_)
                taken = taken * tiles.level_decay(sums, before, decay, level, place)
                total = total + jnp.where(tiles.pairs(level), tiles.product(taken, taken.T), 0.0)
        total = jnp.where(tiles.joined(numbers, row, chunk), scale * total, 0.0)
        tiles.store(weights, total, row, chunk * CHUNK, head, 0)

    return launch(
        body,
        name="channel_scores",
        grid=(chunks, batch * heads),
        inputs={"q": q, "k": k, "sums": sums, "bonus": bonus} | numbers._asdict(),
        outputs={"weights": jax.ShapeDtypeStruct((batch, chunks * CHUNK, heads, CHUNK), jnp.bfloat16)},
        warps=8,
    )["weights"]


def decayed(
    x: Any, sums: Any, numbers: Numbers, place: tiles.Place, scale: float | None, early: bool
) -> tuple[jax.Array, jax.Array]:
    """A tile of reading queries scale q b, or of writing keys k w if `scale` is None, and the sums over the chunk.

    With `early` queries read the state before the step.
    """
    row, chunk, head, lane = place
    where = row, chunk * CHUNK
    tile = tiles.load(x, *where, tiles.shared(x, head, sums.shape[2]), lane).astype(jnp.float32)
    decay, total = tiles.load(sums, *where, head, lane), tiles.last(sums, place)
    if scale is None:
        return tiles.only(tiles.writing(numbers, row, chunk), tile * jnp.exp2(total[None] - decay)), total
    if early:
        decay = tiles.sums_before(sums, place)
    return tiles.only(tiles.reading(numbers, row, chunk), scale * tile * jnp.exp2(decay)), total


def walk(
    x: jax.Array,
    values: jax.Array,
    sums: jax.Array,
    numbers: Numbers,
    state: jax.Array,
    scale: float | None = None,
    early: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns the states before every chunk of the walk, (b, h, n, k, v), bfloat16, and the last, (b, h, k, v), float32.

    Args:
      x: (b, t, heads, k), the keys; the queries for the walk from the last chunk to the first.
      values: (b, t, heads, v), the values, or the gradients of the outputs.
      state: (b, h, k, v), float32, the state before the first chunk of the walk.
      scale: that of the queries; None for the walk with keys.
      early: whether queries read the state before the step.
    """
    batch, time, heads, keys = sums.shape
    width, chunks = values.shape[3], pl.cdiv(time, CHUNK)

    def body(*, x, values, sums, state, states, final, **segments):
        lane, column, at = pl.program_id(0) * PART, pl.program_id(1) * PART, pl.program_id(2)
        row, head, numbers = at // heads, at % heads, Numbers(**segments)
        window = pl.ds(lane, PART), pl.ds(column, PART)
        inside = (lane + jnp.arange(PART) < keys)[:, None] & (column + jnp.arange(PART) < width)[None]

        def step(turn, carried):
            chunk = turn if scale is None else chunks - 1 - turn
            pltriton.store(states.at[row, head, chunk, *window], carried.astype(jnp.bfloat16), mask=inside)
            tile, total = decayed(x, sums, numbers, tiles.Place(row, chunk, head, lane), scale, early)
            added = tiles.load(values, row, chunk * CHUNK, tiles.shared(values, head, heads), column)
            passed = carried * tiles.kept(numbers, total, row, chunk)[:, None]
            return passed + tiles.product(tile.T, added)

        carried = pltriton.load(state.at[row, head, *window], mask=inside, other=0)
        carried = jax.lax.fori_loop(0, chunks, step, carried)
        pltriton.store(final.at[row, head, *window], carried, mask=inside)

    results = launch(
        body,
        name="channel_walk",
        grid=(pl.cdiv(keys, PART), pl.cdiv(width, PART), batch * heads),
        inputs={"x": x, "values": values, "sums": sums, "state": state} | numbers._asdict(),
        outputs={
            "states": jax.ShapeDtypeStruct((batch, heads, chunks, keys, width), jnp.bfloat16),
            "final": jax.ShapeDtypeStruct((batch, heads, keys, width), jnp.float32),
        },
    )
    return results["states"], results["final"]


def outputs(
    x: jax.Array,
    values: jax.Array,
    sums: jax.Array,
    numbers: Numbers,
    weights: jax.Array,
    states: jax.Array,
    scale: float | None = None,
    early: bool = False,
) -> jax.Array:
    """Returns the outputs (b, t, h, v), or with keys and `scale` None the gradients of the values, bfloat16.

    Args:
      x, values, scale, early: as for the walk of the other direction: queries with values, keys with gradients of outputs.
      weights: what `scores` returns.
      states: (b, h, n, k, v), before every chunk of the walk in this direction.
    """
    batch, time, heads, keys = sums.shape
    width = values.shape[3]
    columns = 128 if width % 128 == 0 else PART

    def body(*, x, values, sums, weights, states, out, **segments):
        column, chunk, at = pl.program_id(0) * columns, pl.program_id(1), pl.program_id(2)
        row, head, numbers = at // heads, at % heads, Numbers(**segments)
        of_chunk = tiles.load(weights, row, chunk * CHUNK, head, 0)
        own = tiles.load(values, row, chunk * CHUNK, tiles.shared(values, head, heads), column, columns)
        total = tiles.product(of_chunk.T if scale is None else of_chunk, own)
        for lane in range(0, keys, PART):
            tile, _ = decayed(x, sums, numbers, tiles.Place(row, chunk, head, lane), scale, early)
            total = total + tiles.product(tile, state_tile(states, row, head, chunk, lane, column, columns))
        tiles.store(out, total, row, chunk * CHUNK, head, column)

    return launch(
        body,
        name="channel_outputs",
        grid=(pl.cdiv(width, columns), pl.cdiv(time, CHUNK), batch * heads),
        inputs={"x": x, "values": values, "sums": sums, "weights": weights, "states": states}
        | numbers._asdict(),
        outputs={"out": jax.ShapeDtypeStruct((batch, time, heads, width), values.dtype)},
    )["out"]


def state_tile(
    states: Any, row: Any, head: Any, chunk: Any, lane: Any, column: Any, columns: int
) -> jax.Array:
    """A tile (part, columns) of the state of a chunk, with 0 outside."""
    keys, width = states.shape[3:]
    view = states.at[row, head, chunk, tiles.span(lane, PART), tiles.span(column, columns)]
    inside = (lane + jnp.arange(PART) < keys)[:, None] & (column + jnp.arange(columns) < width)[None]
    return pltriton.load(view, mask=inside, other=0)
