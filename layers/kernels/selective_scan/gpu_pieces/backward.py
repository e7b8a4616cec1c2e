"""The backward pass of `selective_scan`, by pieces of time.

A program takes 32 channels of one row and one piece, a lane one channel, as those of kernels.py do, and walks from the end of the piece.
"""

import jax
import jax.numpy as jnp

from layers.kernels.pallas_triton import launch, pl, pltriton
from layers.kernels.selective_scan.gpu.kernels import LOG2_E, SPAN
from layers.kernels.selective_scan.gpu_pieces import kernels
from layers.kernels.selective_scan.gpu_pieces.kernels import Series, States, Step
from layers.kernels.triton_ptx import LANES, in_one_operation, sums_over_lanes


def backward(
    series: Series,
    a: jax.Array,
    borders: jax.Array,
    dy: jax.Array,
    dfinal: jax.Array,
    *,
    softplus: bool,
    length: int,
) -> dict[str, jax.Array]:
    """Returns gradients: dx and ddt, dstate (b, n, d), da (b, pieces, n, d), dbias (b, pieces, d), dvectors (b, programs, t, lanes).

    Args:
      borders: what `forward` keeps; the other arguments are its own, and the gradients of its results.
    """
    batch, time, channels = series.x.shape
    programs, pieces, spans = pl.cdiv(channels, LANES), pl.cdiv(time, length), length // SPAN
    leaving = dfinal[:, None]
    if pieces > 1:
        found = kernels.effects(series, a, dy, softplus=softplus, length=length)
        leaving = kernels.entering(*found, a, dfinal, reverse=True)

    def body(
        *, x, dt, vectors, bias, flags, a, borders, dy, leaving, dx, ddt, da, dstate, dvectors, dbias=None
    ):
        given, at = Series(x, dt, vectors, bias, flags), kernels.place(x, a, vectors)
        rates, shift = kernels.rates_of(a, at), None if bias is None else kernels.load(bias, at)
        start, program = at.piece * length, pl.program_id(0)

        def span_of(first):
            return [kernels.load_step((x, dt, dy), at, first + offset) for offset in range(SPAN)]

        def put_vectors(step, value):
            for part, sums in enumerate(value):
                view = dvectors.at[at.row, program, step.place, pl.ds(jnp.int32(part * LANES), LANES)]
                pltriton.store(view, sums, mask=jnp.broadcast_to(step.real, (LANES,)))

        def span(turn, carry):
            flowing, drates, dshift, loaded = carry
            number = spans - 1 - turn
            first = start + number * SPAN
            coming = span_of(first - SPAN)
            steps = [
                kernels.prepared(v, given, shift, at, first + offset, softplus)
                for offset, v in enumerate(loaded)
            ]
            place = jnp.minimum(at.piece * spans + number, borders.shape[1] - 1)
            states = [kernels.load_states(borders, at, at.row, place)]
            read = [kernels.vectors_of(vectors, at, step.place) for step in steps]
            for step, (b, _) in zip(steps, read, strict=True):
                states.append(kernels.after(step, rates, states[-1], b))
            for offset in reversed(range(SPAN)):
                step = steps[offset]
                dout = jnp.where(step.real, loaded[offset][2].astype(jnp.float32), 0.0)
                b, c = read[offset]
                g = in_one_operation(kernels.with_output, flowing, c, dout)
                put_vectors(step, _vector_gradients(step, g, states[offset + 1], dout))
                dinput = in_one_operation(_summed, g, b)
                flowing = kernels.before(step, rates, g)
                drates = _rate_gradients(step, drates, flowing, states[offset])
                through = in_one_operation(_through_decays, flowing, states[offset], rates)
                dstep = step.slope * (step.x * dinput + through / LOG2_E)
                dshift = dshift + dstep
                kernels.store(dx, step.dt * dinput, at, at.row, step.place, where=step.real)
                kernels.store(ddt, dstep, at, at.row, step.place, where=step.real)
            return flowing, drates, dshift, coming

        zero = jnp.zeros((LANES,), jnp.float32)
        flowing = kernels.load_states(leaving, at, at.row, at.piece)
        carry = flowing, [zero] * at.states, zero, span_of(start + (spans - 1) * SPAN)
        flowing, drates, dshift, _ = jax.lax.fori_loop(0, spans, span, carry)
        kernels.store_states(dstate, flowing, at, at.row, where=at.piece == 0)
        kernels.store_states(da, drates, at, at.row, at.piece)
        if dbias is not None:
            kernels.store(dbias, dshift, at, at.row, at.piece)

    def float32(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    outputs = {
        "dx": jax.ShapeDtypeStruct(series.x.shape, series.x.dtype),
        "ddt": jax.ShapeDtypeStruct(series.dt.shape, series.dt.dtype),
        "da": float32(batch, pieces, *a.shape),
        "dstate": float32(batch, *a.shape),
        "dvectors": float32(batch, programs, time, series.vectors.shape[3]),
    }
    if series.bias is not None:
        outputs["dbias"] = float32(batch, pieces, channels)
    return launch(
        body,
        name="selective_scan_gradients",
        grid=(programs, pieces, batch),
        inputs={**series._asdict(), "a": a, "borders": borders, "dy": dy, "leaving": leaving},
        outputs=outputs,
        warps=1,
    )


def _vector_gradients(step: Step, g: States, states: States, dout: jax.Array) -> States:
    """The sums over lanes of the gradients of b and c, as `kernels.packed` arranges them."""

    def summands(dt, x, g, states, dout):
        written, zeros = dt * x, [jnp.zeros((LANES,), jnp.float32)]
        db, dc = [v * written for v in g], [h * dout for h in states]
        values = db + zeros * (kernels.padded(len(db)) - len(db)) + dc
        return values + zeros * (-len(values) % LANES)

    def part_of(first):
        return lambda *args: summands(*args)[first : first + LANES]

    parts = range(0, 2 * kernels.padded(len(g)), LANES)
    return [sums_over_lanes(part_of(first), step.dt, step.x, g, states, dout) for first in parts]


def _rate_gradients(step: Step, drates: States, flowing: States, states: States) -> States:
    """The gradients of the rates so far and from a step, from those of the states before it and these."""

    def gradients(dt, drates, flowing, states):
        return [total + v * h * dt for total, v, h in zip(drates, flowing, states, strict=True)]

    return in_one_operation(gradients, step.dt, drates, flowing, states)


def _summed(v: States, h: States) -> jax.Array:
    return sum(p * q for p, q in zip(v, h, strict=True))


def _through_decays(flowing: States, states: States, rates: States) -> jax.Array:
    return sum(v * h * rate for v, h, rate in zip(flowing, states, rates, strict=True))
