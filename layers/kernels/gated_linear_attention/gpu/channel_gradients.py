"""The Triton kernels of `gated_linear_attention` with a decay per key channel, backward: gradients of q, k and decay.

With the notation of channel_kernels.py, the states S entering and the gradients R of the states leaving all chunks are known.
Every chunk then stands alone:

    dP = scale do v^T,    dq = scale b do S^T + ...,    dk = w v R^T + ....

What is missing are the pairs of steps inside the chunk. Each level (channel_tiles.py) takes the pairs that it splits, in both
orders, out of the symmetric matrix D = dP + dP^T. With its tile X of decayed queries and keys, and their decays F, the rows of
F o (D X) are gradients of q in second blocks and of k in first blocks.

The exponents of X are sums of log-decay. Their gradient is X o (D X), a term of dq . q or of dk . k, so a log-decay gathers
dq . q - dk . k from its step to the end of the chunk (dq . q from after its step where a bonus stands for the step itself). Pairs of two such steps cancel in this sum, because both terms come from
the same rounded factors. What the chunk writes decays from after each step, and the state over the whole chunk, so these
terms are summed over earlier steps and over values without such cancellation.
"""

import jax
import jax.numpy as jnp

from layers.kernels.gated_linear_attention.gpu import channel_tiles as tiles
from layers.kernels.gated_linear_attention.gpu.channel_kernels import state_tile
from layers.kernels.gated_linear_attention.gpu.channel_tiles import CHUNK, LEVELS, PART, Numbers
from layers.kernels.pallas_triton import launch, pl, pltriton


def score_gradients(do: jax.Array, v: jax.Array, heads: int, numbers: Numbers, scale: float) -> jax.Array:
    """Returns dP, (b, n * c, h, c), bfloat16, with 0 for pairs that have no score."""
    batch, time, _, width = do.shape
    chunks = pl.cdiv(time, CHUNK)

    def body(*, do, v, dscores, **segments):
        chunk, at = pl.program_id(0), pl.program_id(1)
        row, head, numbers = at // heads, at % heads, Numbers(**segments)
        total = jnp.zeros((CHUNK, CHUNK), jnp.float32)
        for column in range(0, width, PART):
            left, right = (
                tiles.load(x, row, chunk * CHUNK, tiles.shared(x, head, heads), column) for x in (do, v)
            )
            total = total + tiles.product(left, right.T)
        total = jnp.where(tiles.joined(numbers, row, chunk), scale * total, 0.0)
        tiles.store(dscores, total, row, chunk * CHUNK, head, 0)

    return launch(
        body,
        name="channel_score_gradients",
        grid=(chunks, batch * heads),
        inputs={"do": do, "v": v} | numbers._asdict(),
        outputs={"dscores": jax.ShapeDtypeStruct((batch, chunks * CHUNK, heads, CHUNK), jnp.bfloat16)},
    )["dscores"]


def gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    sums: jax.Array,
    bonus: jax.Array | None,
    numbers: Numbers,
    dscores: jax.Array,
    states: jax.Array,
    dstates: jax.Array,
    scale: float,
) -> dict[str, jax.Array]:
    """Returns dq and dk, (b, t, h, k), bfloat16, dg, (b, t, h, k), and, with a bonus, its terms dbonus, (b, n, h, k), float32.

    Args:
      q, k, v, do: (b, t, heads, width), bfloat16.
      sums: (b, t, h, k), of log-decay.
      bonus: (h, k), float32, or None.
      dscores: what `score_gradients` returns.
      states, dstates: (b, h, n, k, v), bfloat16: the states that enter chunks, and the gradients of those that leave them.
    """
    batch, time, heads, keys = sums.shape
    width = v.shape[3]

    def body(*, q, k, v, do, sums, bonus, dscores, states, dstates, dq, dk, dg, dbonus=None, **segments):
        lane, chunk, at = pl.program_id(0) * PART, pl.program_id(1), pl.program_id(2)
        row, head, numbers = at // heads, at % heads, Numbers(**segments)
        place = tiles.Place(row, chunk, head, lane)
        first, step = chunk * CHUNK, jnp.arange(CHUNK)
        own = step[:, None] == step[None]

        def tile(x, lane):
            return tiles.load(x, row, first, tiles.shared(x, head, heads), lane)

        dqueries = dkeys = jnp.zeros((CHUNK, PART), jnp.float32)
        passed = jnp.zeros((PART,), jnp.float32)
        for column in range(0, width, PART):
            state, dstate = (state_tile(x, row, head, chunk, lane, column, PART) for x in (states, dstates))
            dqueries = dqueries + tiles.product(tile(do, column), state.T)
            dkeys = dkeys + tiles.product(tile(v, column), dstate.T)
            passed = passed + (state.astype(jnp.float32) * dstate.astype(jnp.float32)).sum(1)

        queries, keys_, decay = (tile(x, lane).astype(jnp.float32) for x in (q, k, sums))
        total = tiles.last(sums, place)
        before = decay if bonus is None else tiles.sums_before(sums, place)
        after = jnp.exp2(total[None] - decay)
        dqueries = tiles.only(tiles.reading(numbers, row, chunk), scale * dqueries * jnp.exp2(before))
        dkeys = tiles.only(tiles.writing(numbers, row, chunk), dkeys * after)
        written, ddecay = dkeys * keys_, dqueries * queries
        dlog = jnp.cumsum(written, axis=0) - written + (passed * tiles.kept(numbers, total, row, chunk))[None]

        lower = tiles.load(dscores, row, first, head, 0).astype(jnp.float32)
        diagonal = jnp.where(own, lower, 0.0).sum(1)[:, None]
        weight = 1.0 if bonus is None else tiles.bonus_of(bonus, head, lane)
        dqueries, dkeys = dqueries + diagonal * weight * keys_, dkeys + diagonal * weight * queries
        if bonus is not None:
            of_chunk = (diagonal * queries * keys_).sum(0)
            inside = lane + jnp.arange(PART) < keys
            pltriton.store(dbonus.at[row, chunk, head, tiles.span(lane, PART)], of_chunk, mask=inside)
        crossing, dwritten = lower + lower.T, jnp.zeros((CHUNK, PART), jnp.float32)
        for level in range(LEVELS):
            factor = tiles.level_decay(sums, before, decay, level, place)
            later = tiles.second(level)
            taken = (jnp.where(later, queries, keys_) * factor).astype(jnp.bfloat16)
            crossed = tiles.product(jnp.where(tiles.pairs(level), crossing, 0.0), taken)
            exponent = taken.astype(jnp.float32) * crossed
            dqueries = dqueries + jnp.where(later, crossed * factor, 0.0)
            dkeys = dkeys + jnp.where(later, 0.0, crossed * factor)
            ddecay = ddecay + jnp.where(later, exponent, 0.0)
            dwritten = dwritten - jnp.where(later, 0.0, exponent)
        # From every step to the end, and for queries whose sums end earlier from after it: all but what lies before.
        gathered = ddecay + dwritten
        dlog = dlog + gathered.sum(0)[None] - (jnp.cumsum(gathered, axis=0) - gathered)
        if bonus is not None:
            dlog = dlog - ddecay
        for ref, x in ((dq, dqueries), (dk, dkeys), (dg, dlog)):
            tiles.store(ref, x, row, first, head, lane)

    made = {
        "dq": jax.ShapeDtypeStruct(sums.shape, q.dtype),
        "dk": jax.ShapeDtypeStruct(sums.shape, k.dtype),
        "dg": jax.ShapeDtypeStruct(sums.shape, jnp.float32),
    }
    if bonus is not None:
        made["dbonus"] = jax.ShapeDtypeStruct((batch, pl.cdiv(time, CHUNK), heads, keys), jnp.float32)
    return launch(
        body,
        name="channel_gradients",
        grid=(pl.cdiv(keys, PART), pl.cdiv(time, CHUNK), batch * heads),
        inputs={
            "q": q,
            "k": k,
            "v": v,
            "do": do,
            "sums": sums,
            "bonus": bonus,
            "dscores": dscores,
            "states": states,
            "dstates": dstates,
        }
        | numbers._asdict(),
        outputs=made,
        warps=8,
    )
