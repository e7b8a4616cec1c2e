"""The Triton kernel of the delta rules with a decay per key channel that prepares chunks: scores, inverses and decayed arrays.

With the notation of channel_kernels.py it computes, of all chunks at once,

    P_ij = scale sum_d q_id w_jd decay_d(j -> i) for j <= i,    T = (I + N)^-1,    scale q b,    e b,    w r,

with N as P for e, j < i and no scale. Pairs of steps go by levels, see channel_tiles.py of `gated_linear_attention`; both scores share
the decays of a level, and the products of a level run over all key features before its pairs are taken out of them. It moves nine
arrays of the size of q. More than half of its instructions are those of the levels.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels.gated_linear_attention.gpu import channel_tiles as tiles
from layers.kernels.gated_linear_attention.gpu.channel_tiles import CHUNK, LEVELS, PART, Numbers, Place
from layers.kernels.pallas_triton import launch, pl


class Prepared(NamedTuple):
    """What `prepare` returns of columns w: scores of every chunk (b, n * c, h, c), and decayed arrays (b, t, h, k), bfloat16."""

    of_queries: jax.Array
    of_erasers: jax.Array
    columns: jax.Array
    queries: jax.Array | None = None
    erasers: jax.Array | None = None


def prepare(
    q: jax.Array,
    e: jax.Array,
    w: jax.Array,
    sums: jax.Array,
    numbers: Numbers,
    scale: float,
    early: bool,
    inverted: bool,
) -> Prepared:
    """Returns `Prepared`: P, T, w r, scale q b and e b; without `inverted`, P, -N and w r.

    Args:
      q, e, w: (b, t, heads, k), bfloat16.
      sums: (b, t, h, k), of log-decay, see `channel_tiles.sums`.
      early: whether e reads the state before the decay of its step.
    """
    batch, time, heads, keys = sums.shape
    chunks = pl.cdiv(time, CHUNK)

    def body(*, q, e, w, sums, of_queries, of_erasers, columns, queries=None, erasers=None, **segments):
        chunk, at = pl.program_id(0), pl.program_id(1)
        row, head, numbers = at // heads, at % heads, Numbers(**segments)
        first, step = chunk * CHUNK, jnp.arange(CHUNK)
        reading, writing = tiles.reading(numbers, row, chunk), tiles.writing(numbers, row, chunk)
        diagonal, parts = jnp.zeros((CHUNK,), jnp.float32), []
        for lane in range(0, keys, PART):
            place = Place(row, chunk, head, lane)
            rows, erased, written, decay = (
                tiles.load(x, row, first, tiles.shared(x, head, heads), lane) for x in (q, e, w, sums)
            )
            before = tiles.sums_before(sums, place) if early else decay
            total = tiles.last(sums, place)[None]
            made = [(columns, writing, written * jnp.exp2(total - decay))]
            if inverted:
                made.append((queries, reading, scale * (rows * jnp.exp2(decay))))
                made.append((erasers, reading, erased * jnp.exp2(before)))
            for ref, flags, x in made:
                tiles.store(ref, tiles.only(flags, x), row, first, head, lane)
            diagonal = diagonal + (rows.astype(jnp.float32) * written.astype(jnp.float32)).sum(1)
            parts.append((place, (rows, erased), written, decay, before))

        split = jnp.where(tiles.joined(numbers, row, chunk), split_at(), -1)

        def joined(level, found):
            later, products = tiles.second(level), []
            for place, rows, written, decay, before in parts:
                of_level = factors(sums, decay, before, level, place, early)
                taken = [
                    (jnp.where(later, x, written) * factor).astype(jnp.bfloat16)
                    for x, factor in zip(rows, of_level, strict=True)
                ]
                products.append([tiles.product(x, x.T) for x in taken])
            products = [functools.reduce(jnp.add, x) for x in zip(*products, strict=True)]
            return tuple(jnp.where(split == level, x, y) for x, y in zip(products, found, strict=True))

        square = jnp.zeros((CHUNK, CHUNK), jnp.float32)
        read, lower = jax.lax.fori_loop(0, LEVELS, joined, (square, square))
        read = scale * jnp.where(step[:, None] == step[None], diagonal[:, None], read)
        tiles.store(of_queries, read, row, first, head, 0)
        tiles.store(of_erasers, _inverse(lower, split) if inverted else -lower, row, first, head, 0)

    square = jax.ShapeDtypeStruct((batch, chunks * CHUNK, heads, CHUNK), jnp.bfloat16)
    wide = jax.ShapeDtypeStruct(sums.shape, jnp.bfloat16)
    results = launch(
        body,
        name="delta_prepare",
        grid=(chunks, batch * heads),
        inputs={"q": q, "e": e, "w": w, "sums": sums} | numbers._asdict(),
        outputs=dict(zip(Prepared._fields, [square, square, wide] + [wide, wide] * inverted)),
        warps=8,
    )
    return Prepared(**results)


def split_at() -> jax.Array:
    """The level that splits each pair of steps, (c, c); -1 for a step and itself."""
    step = jnp.arange(CHUNK)
    apart = step[:, None] ^ step[None]
    return sum((apart >= 1 << level).astype(jnp.int32) for level in range(LEVELS)) - 1


def factors(
    sums: Any, decay: jax.Array, before: jax.Array, level: jax.Array, place: Place, early: bool
) -> tuple[jax.Array, jax.Array]:
    """The factors (c, part) of a level for queries and for what erases, as `channel_tiles.level_decay` has them."""
    border = tiles.borders(sums, level, place)
    of_rows = _between(decay, border)
    return of_rows, _between(jnp.where(tiles.second(level), before, decay), border) if early else of_rows


def _between(sums: jax.Array, border: jax.Array) -> jax.Array:
    """exp2(-|sums - border|), with one instruction less per entry than by `abs`. Steps beyond the end have sums of 0."""
    difference = sums - border
    return jnp.exp2(jnp.minimum(difference, -difference))


def _inverse(lower: jax.Array, split: jax.Array) -> jax.Array:
    """(I + lower)^-1.

    Blocks of 2^l steps are joined level by level, T <- T - T C T with C the entries that join two of them (triangular.py), and one step
    of Newton's method takes off most of what rounding leaves, as for one decay per head (`forward.prepare`): there without it,
    errors are up to three times as large where beta is near 2 and keys are alike.
    """
    step = jnp.arange(CHUNK)
    identity = jnp.where(step[:, None] == step[None], 1.0, 0.0)
    found = identity - jnp.where(split == 0, lower, 0.0)
    for level in range(1, LEVELS):
        joining = jnp.where(split == level, lower, 0.0)
        found = found - tiles.product(tiles.product(found, joining), found)
    rounded, high = found.astype(jnp.bfloat16), lower.astype(jnp.bfloat16)
    known = tiles.product(high, rounded) + tiles.product(lower - high, rounded)
    return rounded + tiles.product(rounded, identity - rounded - known)
