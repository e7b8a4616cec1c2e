"""The Triton kernel of the delta rules with a decay per key channel, backward: gradients of q, e, w and of the decay.

With the notation of channel_kernels.py, the states S entering and the gradients R of the states leaving all chunks are known, and
so are z and dx. Every chunk then stands alone:

    dP = scale do z^T,    dN = -dx z^T,
    dq = scale b do S^T + ...,    de = -b dx S^T + ...,    dw = r z R^T + ....

Pairs of steps inside the chunk follow by levels, and the log-decay from the other gradients, as in channel_gradients.py of
`gated_linear_attention`: with its tile X of decayed rows and columns and the symmetric matrix D = dP + dP^T, the rows of D X are
gradients of q in second blocks and of w in first blocks, and X o (D X) are those of exponents. N has a tile and a matrix of its
own. A log-decay gathers exponents of rows from its step to the end of the chunk, from after its step where e reads before the decay,
less those of columns from its step on.
"""

import jax
import jax.numpy as jnp

from layers.kernels.delta_rule.gpu.channel_scores import factors, split_at
from layers.kernels.gated_linear_attention.gpu import channel_tiles as tiles
from layers.kernels.gated_linear_attention.gpu.channel_kernels import state_tile
from layers.kernels.gated_linear_attention.gpu.channel_tiles import CHUNK, LEVELS, PART, Numbers, Place
from layers.kernels.pallas_triton import launch, pl


def gradients(
    q: jax.Array,
    e: jax.Array,
    w: jax.Array,
    values: jax.Array,
    do: jax.Array,
    dx: jax.Array,
    sums: jax.Array,
    numbers: Numbers,
    states: jax.Array | None,
    dstates: jax.Array,
    scale: float,
    early: bool,
) -> dict[str, jax.Array]:
    """Returns dq, de and dw, (b, t, h, k), bfloat16, and dg, (b, t, h, k), float32.

    Args:
      q, e, w: (b, t, heads, k), bfloat16.
      values: (b, t, h, v), bfloat16, what is written along w.
      do, dx: (b, t, h, v), bfloat16.
      sums: (b, t, h, k), of log-decay.
      states, dstates: (b, h, n, k, v), bfloat16: the states that enter chunks, and the gradients of those that leave them. Without
        `states`, what q and e read from them, and what passes through the chunk, is left out.
      early: whether e reads the state before the decay of its step.
    """
    batch, time, heads, keys = sums.shape
    width, reads = dstates.shape[4], states is not None
    # A loop of one turn would be none to the compiler, which would load everything at once and spill.
    columns = PART if width > PART else PART // 2

    def body(*, q, e, w, values, do, dx, sums, states, dstates, dq, de, dw, dg, **segments):
        lane, chunk, at = pl.program_id(0) * PART, pl.program_id(1), pl.program_id(2)
        row, head, numbers = at // heads, at % heads, Numbers(**segments)
        place, first, step = Place(row, chunk, head, lane), chunk * CHUNK, jnp.arange(CHUNK)

        def tile(x, lane, lanes=PART):
            return tiles.load(x, row, first, tiles.shared(x, head, heads), lane, lanes)

        def of_values(turn, found):
            drows, derased, dwritten, dread, dlower, passed = found
            column = turn * columns
            of_outputs, of_x, made = (tile(x, column, columns) for x in (do, dx, values))
            dread = dread + tiles.product(of_outputs, made.T)
            dlower = dlower + tiles.product(of_x, made.T)
            dstate = state_tile(dstates, row, head, chunk, lane, column, columns)
            dwritten = dwritten + tiles.product(made, dstate.T)
            if reads:
                state = state_tile(states, row, head, chunk, lane, column, columns)
                drows = drows + tiles.product(of_outputs, state.T)
                derased = derased - tiles.product(of_x, state.T)
                passed = passed + (state.astype(jnp.float32) * dstate.astype(jnp.float32)).sum(1)
            return drows, derased, dwritten, dread, dlower, passed

        wide, square = jnp.zeros((CHUNK, PART), jnp.float32), jnp.zeros((CHUNK, CHUNK), jnp.float32)
        found = wide, wide, wide, square, square, jnp.zeros((PART,), jnp.float32)
        found = jax.lax.fori_loop(0, pl.cdiv(width, columns), of_values, found)
        drows, derased, dwritten, dread, dlower, passed = found

        rows, erased, written, decay = (tile(x, lane) for x in (q, e, w, sums))
        before = tiles.sums_before(sums, place) if early else decay
        total = tiles.last(sums, place)
        reading = tiles.reading(numbers, row, chunk)
        drows = tiles.only(reading, scale * drows * jnp.exp2(decay))
        derased = tiles.only(reading, derased * jnp.exp2(before))
        dwritten = tiles.only(tiles.writing(numbers, row, chunk), dwritten * jnp.exp2(total[None] - decay))
        # What a step writes decays from after it to the end of the chunk: the whole, less what is written from the step on.
        leaving = dwritten * written
        passed = passed * tiles.kept(numbers, total, row, chunk) + leaving.sum(0)
        # Exponents of rows from their step on, and of rows that read before the decay of their step.
        exponents, exponents_before = drows * rows - leaving, derased * erased
        if not early:
            exponents, exponents_before = exponents + exponents_before, None

        linked = tiles.joined(numbers, row, chunk)
        dread, dlower = jnp.where(linked, scale * dread, 0.0), jnp.where(linked, -dlower, 0.0)
        diagonal = jnp.where(step[:, None] == step[None], dread, 0.0).sum(1)[:, None]
        drows, dwritten = drows + diagonal * written, dwritten + diagonal * rows
        crossings = [x.astype(jnp.bfloat16) for x in (dread, dlower)]
        crossings = [x + x.T for x in crossings]

        split = split_at()

        def crossed(level, found):
            drows, derased, dwritten, exponents, exponents_before = found
            later, mine = tiles.second(level), split == level
            of_rows, of_erased = factors(sums, decay, before, level, place, early)
            taken = [
                (jnp.where(later, x, written) * factor).astype(jnp.bfloat16)
                for x, factor in ((rows, of_rows), (erased, of_erased))
            ]
            dtaken = [tiles.product(jnp.where(mine, x, 0), y) for x, y in zip(crossings, taken, strict=True)]
            drows = drows + dtaken[0] * jnp.where(later, of_rows, 0.0)
            derased = derased + dtaken[1] * jnp.where(later, of_erased, 0.0)
            # In first blocks both factors are the same.
            dwritten = dwritten + (dtaken[0] + dtaken[1]) * jnp.where(later, 0.0, of_rows)
            from_rows, from_erased = (x.astype(jnp.float32) * y for x, y in zip(taken, dtaken, strict=True))
            sign = jnp.where(later, 1.0, -1.0)
            if not early:
                exponents = exponents + sign * (from_rows + from_erased)
            else:
                exponents = exponents + sign * (from_rows + jnp.where(later, 0.0, from_erased))
                exponents_before = exponents_before + jnp.where(later, from_erased, 0.0)
            return drows, derased, dwritten, exponents, exponents_before

        found = drows, derased, dwritten, exponents, exponents_before
        found = jax.lax.fori_loop(0, LEVELS, crossed, found)
        drows, derased, dwritten, exponents, exponents_before = found
        # From every step to the end, and for rows that read before the decay from after it: all but what lies before.
        gathered = exponents + exponents_before if early else exponents
        dlog = (passed + gathered.sum(0))[None] - (jnp.cumsum(gathered, axis=0) - gathered)
        if early:
            dlog = dlog - exponents_before
        for ref, x in ((dq, drows), (de, derased), (dw, dwritten), (dg, dlog)):
            tiles.store(ref, x, row, first, head, lane)

    narrow, wide = (jax.ShapeDtypeStruct(sums.shape, dtype) for dtype in (jnp.bfloat16, jnp.float32))
    arrays = {"q": q, "e": e, "w": w, "values": values, "do": do, "dx": dx, "sums": sums}
    return launch(
        body,
        name="delta_gradients",
        grid=(pl.cdiv(keys, PART), pl.cdiv(time, CHUNK), batch * heads),
        inputs=arrays | {"states": states, "dstates": dstates} | numbers._asdict(),
        outputs={"dq": narrow, "de": narrow, "dw": narrow, "dg": wide},
        warps=8,
    )
