"""The Triton kernels of the delta rules with a decay per key channel: inverses, and walks through chunks in both directions.

Both rules read the state along e and write along w. In chunks of 64 steps, entered by the state S, with b the decay from the
start of the chunk, and a and r those over the chunk and to its end,

    z = T (x - (e b) S),    T = (I + N)^-1,    N_ij = sum_d e_id w_jd decay_d(j -> i) for j < i,
    o = (scale q b) S + P z + ...,    S' = a S + (w r)^T z + (k r)^T v,

with P the scores of q and w. `delta_rule` has e = k, w = beta k, x = v and no term with k. `dplr_delta_rule` has e = -a and w = b,
x is M v with M the scores of a and k, and e reads the state before the decay of its step.

`inverses` computes T of all chunks at once, `walk` the states that enter the chunks and z, one chunk after the other. Scores and
outputs are those of `gated_linear_attention` (its channel_kernels.py), also how decays enter products (its channel_tiles.py). The
backward pass walks from the last chunk. With R the gradient of the state that leaves a chunk,

    dx = T^T (P^T do + (w r) R),    R of the chunk before = a R + (scale q b)^T do - (e b)^T dx.

A program of a walk holds all keys and a part of the values, since the rule mixes keys. What a walk takes is the time of its chain:
three products of 64 x 64 and two with the state forward, four and three backward.
"""

from typing import Any

import jax
import jax.numpy as jnp

from layers.kernels.gated_linear_attention.gpu import channel_tiles as tiles
from layers.kernels.gated_linear_attention.gpu.channel_kernels import all_pairs
from layers.kernels.gated_linear_attention.gpu.channel_tiles import CHUNK, LEVELS, PART, Numbers, Place
from layers.kernels.pallas_triton import launch, pl, pltriton


def inverses(e: jax.Array, w: jax.Array, sums: jax.Array, numbers: Numbers, early: bool) -> jax.Array:
    """Returns T, (b, n * c, h, c), bfloat16.

    Blocks of 2^l steps are joined level by level, T <- T - T C T with C the entries of N that join two of them (triangular.py),
    by products of numbers rounded to TensorFloat-32.

    Args:
      e, w: (b, t, heads, k), bfloat16.
      sums: (b, t, h, k), of log-decay, see `channel_tiles.sums`.
      early: whether e reads the state before the decay of its step.
    """
    batch, time, heads, _ = sums.shape
    chunks = pl.cdiv(time, CHUNK)

    def body(*, e, w, sums, inverse, **segments):
        chunk, at = pl.program_id(0), pl.program_id(1)
        row, head, numbers = at // heads, at % heads, Numbers(**segments)
        lower = all_pairs(e, w, sums, None, (row, chunk, head), early, strict=True)
        lower = jnp.where(tiles.joined(numbers, row, chunk), lower, 0.0)
        step = jnp.arange(CHUNK)
        found = jnp.where(step[:, None] == step[None], 1.0, 0.0) - jnp.where(tiles.pairs(0), lower, 0.0)
        for level in range(1, LEVELS):
            joining = jnp.where(tiles.pairs(level), lower, 0.0)
            found = found - jnp.dot(jnp.dot(found, joining), found)
        tiles.store(inverse, found, row, chunk * CHUNK, head, 0)

    return launch(
        body,
        name="delta_inverses",
        grid=(chunks, batch * heads),
        inputs={"e": e, "w": w, "sums": sums} | numbers._asdict(),
        outputs={"inverse": jax.ShapeDtypeStruct((batch, chunks * CHUNK, heads, CHUNK), jnp.bfloat16)},
        warps=8,
    )["inverse"]


def _decayed(
    readers: tuple[Any, ...],
    writers: tuple[Any, ...],
    sums: Any,
    numbers: Numbers,
    place: Place,
    early: tuple[bool, ...],
) -> tuple[list[jax.Array], list[jax.Array], jax.Array]:
    """Tiles of arrays decayed from the start of the chunk, tiles decayed to its end, bfloat16, and the decay over it, (part, 1)."""
    row, chunk, head, lane = place
    heads, first = sums.shape[2], chunk * CHUNK
    decay, total = tiles.load(sums, row, first, head, lane), tiles.last(sums, place)

    def taken(x, flags, exponent):
        tile = tiles.load(x, row, first, tiles.shared(x, head, heads), lane).astype(jnp.float32)
        return tiles.only(flags, tile * jnp.exp2(exponent)).astype(jnp.bfloat16)

    reading, writing = tiles.reading(numbers, row, chunk), tiles.writing(numbers, row, chunk)
    return (
        [taken(x, reading, tiles.sums_before(sums, place) if y else decay) for x, y in zip(readers, early)],
        [taken(x, writing, total[None] - decay) for x in writers],
        tiles.kept(numbers, total, row, chunk)[:, None],
    )


def _window(states: Any, lane: int, column: Any, columns: int) -> tuple[tuple[Any, Any], jax.Array]:
    """The part of the last two axes of states (..., k, v) that a tile covers, and which of its entries lie inside."""
    keys, width = states.shape[-2:]
    inside = (lane + jnp.arange(PART) < keys)[:, None] & (column + jnp.arange(columns) < width)[None]
    return (tiles.span(lane, PART), tiles.span(column, columns)), inside


def _walk(name, step, inputs, numbers, values, sums, state, columns, reverse):
    """Runs `step` on every chunk in turn, and returns states before each, in bfloat16, what it writes, and the last state.

    Args:
      step: (row, chunk, head, column, states, numbers, refs) -> (states, values), the tiles of states by key features and
        the tile of `made` that it writes.
      inputs: arrays by name; `refs` has those names.
      values: the array that `made` is like.
      state: (b, h, k, v), float32, the state before the first chunk of the walk.
      columns: value features per program.
      reverse: whether the walk begins with the last chunk.
    """
    batch, time, heads, keys = sums.shape
    width, chunks = values.shape[3], pl.cdiv(time, CHUNK)
    lanes = range(0, keys, PART)

    def body(*, state, states, made, final, steps, entering, leaving, **refs):
        column, at = pl.program_id(0) * columns, pl.program_id(1)
        row, head, numbers = at // heads, at % heads, Numbers(steps, entering, leaving)
        windows = [_window(state, lane, column, columns) for lane in lanes]

        def turn(count, carried):
            chunk = chunks - 1 - count if reverse else count
            for (window, inside), tile in zip(windows, carried, strict=True):
                pltriton.store(states.at[row, head, chunk, *window], tile.astype(jnp.bfloat16), mask=inside)
            carried, written = step(row, chunk, head, column, carried, numbers, refs)
            tiles.store(made, written, row, chunk * CHUNK, head, column)
            return carried

        carried = tuple(
            pltriton.load(state.at[row, head, *window], mask=inside, other=0) for window, inside in windows
        )
        carried = jax.lax.fori_loop(0, chunks, turn, carried)
        for (window, inside), tile in zip(windows, carried, strict=True):
            pltriton.store(final.at[row, head, *window], tile, mask=inside)

    results = launch(
        body,
        name=name,
        grid=(pl.cdiv(width, columns), batch * heads),
        inputs=inputs | {"state": state} | numbers._asdict(),
        outputs={
            "states": jax.ShapeDtypeStruct((batch, heads, chunks, keys, width), jnp.bfloat16),
            "made": jax.ShapeDtypeStruct((batch, time, heads, width), jnp.bfloat16),
            "final": jax.ShapeDtypeStruct((batch, heads, keys, width), jnp.float32),
        },
        warps=WARPS,
    )
    return results["states"], results["made"], results["final"]


COLUMNS = 64  # value features per program of a walk
WARPS = 4  # per program of a walk


def walk(
    e: jax.Array,
    w: jax.Array,
    x: jax.Array,
    sums: jax.Array,
    inverse: jax.Array,
    numbers: Numbers,
    state: jax.Array,
    others: tuple[jax.Array, jax.Array] | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the states that enter chunks, (b, h, n, k, v), and z, (b, t, h, v), bfloat16, and the last state, float32.

    Args:
      e, w: (b, t, heads, k), bfloat16.
      x: (b, t, h, v), bfloat16.
      sums: (b, t, h, k), of log-decay.
      inverse: what `inverses` returns.
      state: (b, h, k, v), float32.
      others: keys and values that are written as they are; e then reads before the decay. None for `delta_rule`.
    """
    heads, lanes = sums.shape[2], range(0, sums.shape[3], PART)
    general = others is not None
    k, v = others or (None, None)

    def step(row, chunk, head, column, states, numbers, refs):
        def values(x):
            return tiles.load(x, row, chunk * CHUNK, tiles.shared(x, head, heads), column, COLUMNS)

        right, found = values(refs["x"]).astype(jnp.float32), []
        for lane, state in zip(lanes, states, strict=True):
            (reads,), writes, kept = _decayed(
                (refs["e"],),
                (refs["w"], refs["k"])[: 1 + general],
                refs["sums"],
                numbers,
                Place(row, chunk, head, lane),
                (general,),
            )
            right = right - tiles.product(reads, state)
            found.append((kept * state, writes))
        z = tiles.product(tiles.load(refs["inverse"], row, chunk * CHUNK, head, 0), right)
        added = (z, values(refs["v"])) if general else (z,)
        leaving = tuple(
            sum((tiles.product(x.T, y) for x, y in zip(writes, added, strict=True)), passed)
            for passed, writes in found
        )
        return leaving, z

    inputs = {"e": e, "w": w, "k": k, "v": v, "x": x, "sums": sums, "inverse": inverse}
    return _walk("delta_walk", step, inputs, numbers, x, sums, state, COLUMNS, reverse=False)


def walk_back(
    q: jax.Array,
    e: jax.Array,
    w: jax.Array,
    do: jax.Array,
    sums: jax.Array,
    inverse: jax.Array,
    weights: jax.Array,
    numbers: Numbers,
    dfinal: jax.Array,
    scale: float,
    early: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns gradients: of the states that leave chunks, (b, h, n, k, v), of x, (b, t, h, v), bfloat16, and of the first state.

    Args:
      q, e, w, do: (b, t, heads, width), bfloat16.
      sums: (b, t, h, k), of log-decay.
      inverse: what `inverses` returns.
      weights: P, the scores of q and w.
      dfinal: (b, h, k, v), float32.
      early: whether e reads before the decay of its step.
    """
    heads, lanes = sums.shape[2], range(0, sums.shape[3], PART)

    def step(row, chunk, head, column, dstates, numbers, refs):
        first = chunk * CHUNK
        of_outputs = tiles.load(
            refs["do"], row, first, tiles.shared(refs["do"], head, heads), column, COLUMNS
        )
        dz = tiles.product(tiles.load(refs["weights"], row, first, head, 0).T, of_outputs)
        passed, readers = [], []
        for lane, dstate in zip(lanes, dstates, strict=True):
            (queries, reads), (writes,), kept = _decayed(
                (refs["q"], refs["e"]),
                (refs["w"],),
                refs["sums"],
                numbers,
                Place(row, chunk, head, lane),
                (False, early),
            )
            dz = dz + tiles.product(writes, dstate)
            passed.append(kept * dstate + scale * tiles.product(queries.T, of_outputs))
            readers.append(reads)
        dx = tiles.product(tiles.load(refs["inverse"], row, first, head, 0).T, dz)
        return tuple(p - tiles.product(r.T, dx) for p, r in zip(passed, readers, strict=True)), dx

    inputs = {"q": q, "e": e, "w": w, "do": do, "sums": sums, "inverse": inverse, "weights": weights}
    return _walk("delta_walk_back", step, inputs, numbers, do, sums, dfinal, COLUMNS, reverse=True)
