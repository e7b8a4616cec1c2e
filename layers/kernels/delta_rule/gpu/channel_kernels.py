"""The Triton kernels of the delta rules with a decay per key channel: walks through chunks in both directions, and outputs.

Both rules read the state along e and write along w. In chunks of 64 steps, entered by the state S, with b the decay from the
start of the chunk, and a and r those over the chunk and to its end,

    z = T (x - (e b) S),    T = (I + N)^-1,    N_ij = sum_d e_id w_jd decay_d(j -> i) for j < i,
    o = (scale q b) S + P z + Q v,    S' = a S + (w r)^T z + (k r)^T v,

with P the scores of q and w. `delta_rule` has e = k, w = beta k and x = v, and no terms with k. `dplr_delta_rule` has e = -a, w = b
and x = M v, with Q and -M the scores of q and e against k; there e reads the state before the decay of its step.

channel_scores.py computes scores, inverses and the decayed arrays of all chunks at once, `walk` the states that enter the chunks and z,
one chunk after the other, and `outputs` the outputs of all chunks. The backward pass walks from the last chunk. With R the gradient
of the state that leaves a chunk,

    dx = T^T (P^T do + (w r) R),    R of the chunk before = a R + (scale q b)^T do - (e b)^T dx.

A program of a walk holds all keys and a part of the values, since the rule mixes keys. Its products form a chain, three per chunk
forward and four backward.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels.delta_rule.gpu.channel_scores import Prepared
from layers.kernels.gated_linear_attention.gpu import channel_tiles as tiles
from layers.kernels.gated_linear_attention.gpu.channel_kernels import state_tile
from layers.kernels.gated_linear_attention.gpu.channel_tiles import CHUNK, PART, Numbers, Place
from layers.kernels.pallas_triton import launch, pl, pltriton


class Layout(NamedTuple):
    """The programs of a walk: most value features per program, in parts of 64, and warps."""

    columns: int
    warps: int


# Two narrow programs fit into a processor's shared memory if they read no more than two arrays of keys.
NARROW, WIDE = Layout(64, 8), Layout(128, 4)


def _walk(
    name: str,
    step: Callable[..., tuple[tuple[jax.Array, ...], jax.Array]],
    inputs: Mapping[str, jax.Array],
    sums: jax.Array,
    numbers: Numbers,
    state: jax.Array,
    layout: Layout,
    reverse: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs `step` on one chunk after the other.

    Args:
      step: takes what reads a tile of 64 features of an input by name and first feature, what reads values by name, the tiles of the
        state by key features, and the same times the decay over the chunk; returns the next tiles and the values that it makes.
      inputs: arrays by name.
      sums: (b, t, h, k), of log-decay.
      state: (b, h, k, v), float32, the state before the first chunk of the walk.
      reverse: whether the walk begins with the last chunk.

    Returns:
      The states before every chunk, (b, h, n, k, v), and the values, (b, t, h, v), bfloat16, and the last state, float32.
    """
    batch, time, heads, keys = sums.shape
    width, chunks = state.shape[3], pl.cdiv(time, CHUNK)
    lanes, columns = range(0, keys, PART), layout.columns if width > PART else PART
    warps = layout.warps * columns // layout.columns

    def body(*, sums, state, states, made, final, steps, entering, leaving, **refs):
        column, at = pl.program_id(0) * columns, pl.program_id(1)
        row, head, numbers = at // heads, at % heads, Numbers(steps, entering, leaving)

        def window(lane):
            inside = (lane + jnp.arange(PART) < keys)[:, None] & (column + jnp.arange(columns) < width)[None]
            return (tiles.span(lane, PART), tiles.span(column, columns)), inside

        def turn(count, carried):
            chunk = chunks - 1 - count if reverse else count

            def read(name, lane, width=PART):
                return tiles.load(refs[name], row, chunk * CHUNK, head, lane, width)

            def read_values(name):
                return read(name, column, columns)

            passed = []
            for lane, tile in zip(lanes, carried, strict=True):
                where, inside = window(lane)
                view = states.at[row, head, chunk, *where]
                pltriton.store(view, tile.astype(jnp.bfloat16), mask=inside)
                total = tiles.last(sums, Place(row, chunk, head, lane))
                passed.append(tile * tiles.kept(numbers, total, row, chunk)[:, None])
            carried, new = step(read, read_values, carried, passed)
            tiles.store(made, new, row, chunk * CHUNK, head, column)
            return carried

        views = [
            (ref.at[row, head, *where], inside)
            for ref in (state, final)
            for where, inside in map(window, lanes)
        ]
        count = len(lanes)
        carried = tuple(pltriton.load(view, mask=inside, other=0) for view, inside in views[:count])
        carried = jax.lax.fori_loop(0, chunks, turn, carried)
        for (view, inside), tile in zip(views[count:], carried, strict=True):
            pltriton.store(view, tile, mask=inside)

    results = launch(
        body,
        name=name,
        grid=(pl.cdiv(width, columns), batch * heads),
        inputs={**inputs, "sums": sums, "state": state} | numbers._asdict(),
        outputs={
            "states": jax.ShapeDtypeStruct((batch, heads, chunks, keys, width), jnp.bfloat16),
            "made": jax.ShapeDtypeStruct((batch, time, heads, width), jnp.bfloat16),
            "final": jax.ShapeDtypeStruct((batch, heads, keys, width), jnp.float32),
        },
        warps=warps,
    )
    return results["states"], results["made"], results["final"]


def walk(
    prepared: Prepared,
    x: jax.Array,
    sums: jax.Array,
    numbers: Numbers,
    state: jax.Array,
    others: tuple[jax.Array, jax.Array] | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the states that enter chunks, (b, h, n, k, v), and z, (b, t, h, v), bfloat16, and the last state, float32.

    Args:
      x: (b, t, h, v), bfloat16.
      sums: (b, t, h, k), of log-decay.
      state: (b, h, k, v), float32.
      others: k r and v, that are written as they are, or None.
    """
    lanes = range(0, sums.shape[3], PART)

    def step(read, read_values, states, passed):
        right = read_values("x").astype(jnp.float32)
        for lane, state in zip(lanes, states, strict=True):
            right = right - tiles.product(read("erasers", lane), state)
        z = tiles.product(read("inverse", 0), right)
        added = [("columns", z)] + ([] if others is None else [("keys", read_values("values"))])
        for name, x in added:
            passed = [y + tiles.product(read(name, lane).T, x) for lane, y in zip(lanes, passed, strict=True)]
        return tuple(passed), z

    inputs = {
        "erasers": prepared.erasers,
        "columns": prepared.columns,
        "inverse": prepared.of_erasers,
        "x": x,
    }
    if others is not None:
        inputs |= {"keys": others[0], "values": others[1]}
    return _walk(
        "delta_walk", step, inputs, sums, numbers, state, NARROW if others is None else WIDE, reverse=False
    )


def walk_back(
    prepared: Prepared, do: jax.Array, sums: jax.Array, numbers: Numbers, dfinal: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns gradients: of the states that leave chunks, (b, h, n, k, v), of x, (b, t, h, v), bfloat16, and of the first state.

    Args:
      do: (b, t, h, v), bfloat16.
      sums: (b, t, h, k), of log-decay.
      dfinal: (b, h, k, v), float32.
    """
    lanes = range(0, sums.shape[3], PART)

    def step(read, read_values, dstates, passed):
        of_outputs = read_values("do")
        dz = tiles.product(read("weights", 0).T, of_outputs)
        for lane, dstate in zip(lanes, dstates, strict=True):
            dz = dz + tiles.product(read("columns", lane), dstate)
        dx = tiles.product(read("inverse", 0).T, dz)
        for name, values in (("queries", of_outputs), ("erasers", -dx)):
            passed = [
                y + tiles.product(read(name, lane).T, values) for lane, y in zip(lanes, passed, strict=True)
            ]
        return tuple(passed), dx

    inputs = {name: getattr(prepared, name) for name in ("queries", "erasers", "columns")}
    inputs |= {"do": do, "inverse": prepared.of_erasers, "weights": prepared.of_queries}
    return _walk("delta_walk_back", step, inputs, sums, numbers, dfinal, WIDE, reverse=True)


def outputs(
    pairs: Sequence[tuple[jax.Array, jax.Array]],
    reading: tuple[jax.Array, jax.Array] | None,
    transposed: bool = False,
) -> jax.Array:
    """Returns sums of weights times values, and of what reads states, (b, t, h, v), bfloat16.

    Args:
      pairs: scores (b, n * c, h, c) and values (b, t, h, v), bfloat16.
      reading: decayed arrays (b, t, h, k) and states (b, h, n, k, v), bfloat16, or None.
      transposed: whether the scores are transposed.
    """
    batch, time, heads, width = pairs[0][1].shape
    columns = 128 if width % 128 == 0 else PART
    given = {f"{name}{i}": x for i, pair in enumerate(pairs) for name, x in zip(("weights", "values"), pair)}
    x, states = (None, None) if reading is None else reading

    def body(*, x, states, out, **refs):
        column, chunk, at = pl.program_id(0) * columns, pl.program_id(1), pl.program_id(2)
        row, head, first = at // heads, at % heads, chunk * CHUNK
        total = jnp.zeros((CHUNK, columns), jnp.float32)
        for i in range(len(pairs)):
            weights = tiles.load(refs[f"weights{i}"], row, first, head, 0)
            values = tiles.load(refs[f"values{i}"], row, first, head, column, columns)
            total = total + tiles.product(weights.T if transposed else weights, values)
        for lane in range(0, 0 if x is None else x.shape[3], PART):
            tile = tiles.load(x, row, first, head, lane)
            total = total + tiles.product(tile, state_tile(states, row, head, chunk, lane, column, columns))
        tiles.store(out, total, row, first, head, column)

    return launch(
        body,
        name="delta_outputs",
        grid=(pl.cdiv(width, columns), pl.cdiv(time, CHUNK), batch * heads),
        inputs=given | {"x": x, "states": states},
        outputs={"out": jax.ShapeDtypeStruct((batch, time, heads, width), jnp.bfloat16)},
    )["out"]
