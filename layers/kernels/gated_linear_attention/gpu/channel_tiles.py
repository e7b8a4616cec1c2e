"""What the kernels for a decay per key channel share: tiles of arrays, decays as factors, and pairs of steps by levels.

The score of step i against step j < i is sum_d q_id k_jd exp(G_id - G_jd), with G the sums of log-decay from the start of the
chunk. exp(G_i) and exp(-G_j) by themselves overflow. The difference is split at a border between j and i, so that both factors
are at most 1. Write l for the highest bit in which i and j differ. They then lie in two neighbouring blocks of 2^l steps, and
the border is the last step of the first block. At level l every step therefore has one exponent, -|G - G_border|. The tile X of
a level holds decayed queries in second blocks and decayed keys in first blocks, and its products X X^T hold all the level's
scores.

With a bonus u, queries read the state before the step, so their sums end one step earlier, and the score of a step against itself
is sum_d q_id u_d k_id.

Sums and their differences are float32. A log-decay below -100 counts as -100, which leaves nothing of a channel, so that sums
stay above -9300 (to base 2) and exponents are right to 2^-10.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels.pallas_triton import launch, pl, pltriton

CHUNK = 64
PART = 64  # key features per tile
LEVELS = CHUNK.bit_length() - 1
LOWEST = -100.0


class Place(NamedTuple):
    """The tile of a chunk: its row, chunk and head, and its first feature."""

    row: Any
    chunk: Any
    head: Any
    lane: Any


class Numbers(NamedTuple):
    """The segments of a call: number per step (b, t), and those of the states that enter and leave chunks (b, n), int32."""

    steps: jax.Array | None = None
    entering: jax.Array | None = None
    leaving: jax.Array | None = None


def numbers(number: jax.Array | None) -> Numbers:
    """Returns `Numbers` of segment numbers (b, t), 0 for padding, which count from 1 per row; None for one segment."""
    if number is None:
        return Numbers()
    missing = -number.shape[1] % CHUNK
    by_chunk = jnp.pad(number, ((0, 0), (0, missing))).reshape(number.shape[0], -1, CHUNK)
    leaving = jnp.maximum(jax.lax.cummax(by_chunk.max(2), axis=1), 1)
    entering = jnp.pad(leaving, ((0, 0), (1, 0)), constant_values=1)[:, :-1]
    return Numbers(number, entering, leaving)


def sums(g: jax.Array) -> jax.Array:
    """Returns the sums of log-decay to base 2 from the start of each chunk to every step, (b, t, h, k), float32."""
    batch, time, heads, keys = g.shape

    def body(*, g, sums):
        chunk, part, at = (pl.program_id(axis) for axis in range(3))
        where = at // heads, chunk * CHUNK, at % heads, part * PART
        tile = jnp.maximum(load(g, *where), LOWEST) * math.log2(math.e)
        store(sums, jnp.cumsum(tile, axis=0), *where)

    return launch(
        body,
        name="channel_sums",
        grid=(pl.cdiv(time, CHUNK), pl.cdiv(keys, PART), batch * heads),
        inputs={"g": g},
        outputs={"sums": jax.ShapeDtypeStruct(g.shape, jnp.float32)},
    )["sums"]


def span(start: Any, size: int) -> Any:
    """A slice that may end outside of an array, which Pallas refuses for a start that it knows."""
    return pl.ds(jnp.int32(start), size)


def _window(ref: Any, row: Any, step: Any, head: Any, lane: Any, lanes: int) -> tuple[Any, jax.Array | None]:
    """The part of an array (b, t, h, width) that a tile covers, and which of its entries lie inside, None for all."""
    time, width = ref.shape[1], ref.shape[3]
    view = ref.at[row, pl.ds(step, CHUNK), head, span(lane, lanes)]
    if time % CHUNK == 0 and width % lanes == 0:
        return view, None
    rows, columns = step + jnp.arange(CHUNK) < time, lane + jnp.arange(lanes) < width
    return view, rows[:, None] & columns[None]


def load(ref: Any, row: Any, step: Any, head: Any, lane: Any, lanes: int = PART) -> jax.Array:
    """A tile (c, lanes) of an array (b, t, h, width), with 0 outside."""
    view, inside = _window(ref, row, step, head, lane, lanes)
    return pltriton.load(view, mask=inside, other=None if inside is None else 0)


def store(ref: Any, tile: jax.Array, row: Any, step: Any, head: Any, lane: Any) -> None:
    """Writes the part of a tile that lies inside an array (b, t, h, width)."""
    view, inside = _window(ref, row, step, head, lane, tile.shape[1])
    pltriton.store(view, tile.astype(ref.dtype), mask=inside)


def shared(ref: Any, head: Any, heads: int) -> Any:
    """The head of an array that may have fewer heads."""
    return head // (heads // ref.shape[2])


def last(sums: Any, place: Place) -> jax.Array:
    """The sums over a whole chunk, (part,)."""
    row, chunk, head, lane = place
    step = jnp.minimum((chunk + 1) * CHUNK, sums.shape[1]) - 1
    inside = lane + jnp.arange(PART) < sums.shape[3]
    return pltriton.load(sums.at[row, step, head, span(lane, PART)], mask=inside, other=0)


def second(level: int | jax.Array) -> jax.Array:
    """Which steps (c, 1) lie in second blocks."""
    return (jnp.arange(CHUNK)[:, None] & (1 << level)) != 0


def pairs(level: int | jax.Array) -> jax.Array:
    """The pairs of steps (c, c) that are split at a level, each in both orders."""
    step = jnp.arange(CHUNK)
    apart = step[:, None] ^ step[None]
    return (apart >= 1 << level) & (apart < 2 << level)


def level_decay(
    sums: Any, of_queries: jax.Array, of_keys: jax.Array, level: int | jax.Array, place: Place
) -> jax.Array:
    """The factors (c, part) between steps and the borders of their blocks, from the sums of the chunk."""
    step = _border_steps(level)
    tile = jnp.where(second(level), of_queries, of_keys)
    return jnp.exp2(-jnp.abs(tile - _rows(sums, step, None, place)))


def borders(sums: Any, level: int | jax.Array, place: Place) -> jax.Array:
    """The sums at the borders of the blocks in which the steps of a chunk lie, (c, part)."""
    return _rows(sums, _border_steps(level), None, place)


def _border_steps(level: int | jax.Array) -> jax.Array:
    step = jnp.arange(CHUNK)
    return ((step >> (level + 1)) << (level + 1)) + ((1 << level) - 1)


def sums_before(sums: Any, place: Place) -> jax.Array:
    """The sums from the start of a chunk up to the step before every step, (c, part)."""
    step = jnp.arange(CHUNK)
    return _rows(sums, jnp.maximum(step - 1, 0), (step > 0)[:, None], place)


def _rows(sums: Any, step: jax.Array, inside: jax.Array | None, place: Place) -> jax.Array:
    """The sums of some steps (c,) of a chunk; 0 where a flag (c, 1) of `inside` is not set."""
    row, chunk, head, lane = place
    lanes = lane + jnp.arange(PART)
    step = jnp.minimum(chunk * CHUNK + step, sums.shape[1] - 1)
    within = (lanes < sums.shape[3])[None]
    within = jnp.broadcast_to(within if inside is None else inside & within, (CHUNK, PART))
    return pltriton.load(sums.at[row, step[:, None], head, lanes[None]], mask=within, other=0)


def bonus_of(bonus: Any, head: Any, lane: Any) -> jax.Array:
    """The weights (1, part) of the current step."""
    inside = lane + jnp.arange(PART) < bonus.shape[1]
    return pltriton.load(bonus.at[head, span(lane, PART)], mask=inside, other=0)[None]


def reading(numbers: Numbers, row: Any, chunk: Any) -> jax.Array | None:
    """Which steps (c, 1) read the state that enters the chunk, or None for all."""
    return _equal(numbers.steps, numbers.entering, row, chunk)


def writing(numbers: Numbers, row: Any, chunk: Any) -> jax.Array | None:
    """Which steps (c, 1) write the state that leaves the chunk, or None for all."""
    return _equal(numbers.steps, numbers.leaving, row, chunk)


def _equal(steps: Any, of_chunk: Any, row: Any, chunk: Any) -> jax.Array | None:
    if steps is None:
        return None
    return (step_numbers(steps, row, chunk) == of_chunk[row, chunk])[:, None]


def step_numbers(steps: Any, row: Any, chunk: Any) -> jax.Array:
    """The segment numbers (c,) of a chunk, 0 beyond the end."""
    first = chunk * CHUNK
    inside = first + jnp.arange(CHUNK) < steps.shape[1]
    return pltriton.load(steps.at[row, pl.ds(first, CHUNK)], mask=inside, other=0)


def joined(numbers: Numbers, row: Any, chunk: Any) -> jax.Array:
    """The pairs of steps (c, c) of one segment of which the second is not later than the first."""
    step = jnp.arange(CHUNK)
    found = step[:, None] >= step[None]
    if numbers.steps is not None:
        number = step_numbers(numbers.steps, row, chunk)
        found = found & (number[:, None] == number[None])
    return found


def kept(numbers: Numbers, total: jax.Array, row: Any, chunk: Any) -> jax.Array:
    """The decay of the state over a chunk, from the sums over it."""
    decay = jnp.exp2(total)
    if numbers.steps is None:
        return decay
    return jnp.where(numbers.entering[row, chunk] == numbers.leaving[row, chunk], decay, 0.0)


def only(flags: jax.Array | None, x: jax.Array) -> jax.Array:
    """x where a flag is set, 0 elsewhere; x if there are no flags."""
    return x if flags is None else jnp.where(flags, x, 0.0)


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b in float32, from bfloat16."""
    return jnp.dot(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
