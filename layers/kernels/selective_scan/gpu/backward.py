"""The backward pass of `selective_scan`, by pieces of time.

A program takes 32 channels of one row and one piece, as those of kernels.py do, and walks from the end of the piece. It holds the states of
all its channels as one matrix (n, lanes), which Triton divides over the lanes.
"""

from typing import Any

import jax
import jax.numpy as jnp

from layers.kernels.pallas_triton import LANES, launch, pl, pltriton
from layers.kernels.selective_scan.gpu import kernels
from layers.kernels.selective_scan.gpu.kernels import LOG2_E, SPAN, Place, Series, Step


def _matrix(ref: Any, at: Place, *index: Any) -> jax.Array:
    """States (n, lanes) of an array (..., n, d), float32."""
    rows = kernels.padded(at.states)
    mask = (jnp.arange(rows) < at.states)[:, None] & at.exist[None]
    view = ref.at[*index, pl.ds(jnp.int32(0), rows), pl.ds(at.channel, LANES)]
    return pltriton.load(view, mask=mask, other=0).astype(jnp.float32)


def _put_matrix(ref: Any, value: jax.Array, at: Place, *index: Any, where: Any = True) -> None:
    rows = kernels.padded(at.states)
    mask = (jnp.arange(rows) < at.states)[:, None] & at.exist[None] & where
    view = ref.at[*index, pl.ds(jnp.int32(0), rows), pl.ds(at.channel, LANES)]
    pltriton.store(view, value.astype(ref.dtype), mask=mask)


def _entering(step: Step, h: jax.Array) -> jax.Array:
    return h if step.start is None else jnp.where(step.start, 0.0, h)


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
    programs, pieces, spans, width = (
        pl.cdiv(channels, LANES),
        pl.cdiv(time, length),
        length // SPAN,
        kernels.padded(a.shape[0]),
    )
    leaving = dfinal[:, None]
    if pieces > 1:
        found = kernels.effects(series, a, dy, softplus=softplus, length=length)
        leaving = kernels.entering(*found, a, dfinal, reverse=True)

    def body(
        *, x, dt, vectors, bias, flags, a, borders, dy, leaving, dx, ddt, da, dstate, dvectors, dbias=None
    ):
        given, at = Series(x, dt, vectors, bias, flags), kernels.place(x, a, vectors)
        rates, shift = LOG2_E * _matrix(a, at), None if bias is None else kernels.load(bias, at)
        start, program = at.piece * length, pl.program_id(0)

        def span_of(first):
            return [kernels.load_step((x, dt, dy), at, first + offset) for offset in range(SPAN)]

        def vector(step, first):
            return pltriton.load(vectors.at[at.row, step.place, at.group, pl.ds(jnp.int32(first), width)])[
                :, None
            ]

        def put_vector(value, step, first):
            view = dvectors.at[at.row, program, step.place, pl.ds(jnp.int32(first), width)]
            pltriton.store(view, value, mask=jnp.broadcast_to(step.real, (width,)))

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
            states = [_matrix(borders, at, at.row, place)]
            write, read = ([vector(step, first) for step in steps] for first in (0, width))
            for step, b in zip(steps, write, strict=True):
                kept = jnp.exp2(step.dt[None] * rates) * _entering(step, states[-1])
                states.append(kept + (step.dt * step.x)[None] * b)
            for offset in reversed(range(SPAN)):
                step = steps[offset]
                dout = jnp.where(step.real, loaded[offset][2].astype(jnp.float32), 0.0)
                put_vector((states[offset + 1] * dout[None]).sum(1), step, width)
                g = read[offset] * dout[None] + flowing
                put_vector((g * (step.dt * step.x)[None]).sum(1), step, 0)
                dinput = (g * write[offset]).sum(0)
                flowing = _entering(step, g * jnp.exp2(step.dt[None] * rates))
                w = flowing * states[offset]
                drates = drates + w * step.dt[None]
                dstep = step.slope * (step.x * dinput + (w * rates).sum(0) / LOG2_E)
                dshift = dshift + dstep
                kernels.store(dx, step.dt * dinput, at, at.row, step.place, where=step.real)
                kernels.store(ddt, dstep, at, at.row, step.place, where=step.real)
            return flowing, drates, dshift, coming

        flowing = _matrix(leaving, at, at.row, at.piece)
        nothing = jnp.zeros(rates.shape, jnp.float32)
        carry = flowing, nothing, jnp.zeros((LANES,), jnp.float32), span_of(start + (spans - 1) * SPAN)
        flowing, drates, dshift, _ = jax.lax.fori_loop(0, spans, span, carry)
        _put_matrix(dstate, flowing, at, at.row, where=at.piece == 0)
        _put_matrix(da, drates, at, at.row, at.piece)
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
