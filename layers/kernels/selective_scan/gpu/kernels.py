"""The Triton kernels of `selective_scan`: h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t^T, y_t = h_t c_t, and its gradients.

A program is one warp: it takes 32 channels of one row, a lane one channel with all its states in registers, and walks through
time. Inputs of the next `SPAN` steps are loaded while those of this span are computed.

The backward pass walks from the end. The forward pass keeps the states before every span, from which those within are
computed again, into registers, and the adjoint recurrence runs back through them:

    g_t = c_t dy_t + exp(dt_{t+1} a) g_{t+1},    w_t = g_t exp(dt_t a) h_{t-1},
    dx_t = dt_t sum_n(g_t b_t),    ddt_t = x_t sum_n(g_t b_t) + sum_n(w_t a),
    db_t = sum_d(g_t dt_t x_t),    dc_t = sum_d(dy_t h_t),    da = sum_t(w_t dt_t).

Sums over channels leave once per program.

At 8 x 4096 tokens and 4096 channels of 16 states an H100, which computes 16 exponentials per cycle and processor, needs 0.6 ms for
those of one pass through time; forward there is one such pass, backward there are two.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels.pallas_triton import launch, pl, pltriton

LANES = 32  # channels per program
SPAN = 4  # steps between kept states; with 8 the backward pass spills registers and takes twice as long
START, PADDING = 1, 2  # flags of a step: the state is reset before it; the state stays as it is
LOG2_E = math.log2(math.e)


class Step(NamedTuple):
    """The inputs of a step, float32.

    Attributes:
      dt, x: (lanes,), the step size and the input, 0 on padding.
      slope: (lanes,), the derivative of the step size with respect to what the call gives for it.
      b, c: (n, 1).
      start: whether the state is reset, or None.
    """

    dt: jax.Array
    slope: jax.Array
    x: jax.Array
    b: jax.Array
    c: jax.Array
    start: jax.Array | None


class Place(NamedTuple):
    """What a program works at: its row, its first channel, the channels and states that exist, and the group of b and c."""

    row: Any
    channel: Any
    channels: jax.Array
    states: jax.Array
    group: Any


def _place(x: Any, b: Any) -> Place:
    block, row = pl.program_id(0), pl.program_id(1)
    channel, groups, states = block * LANES, b.shape[2], b.shape[3]
    return Place(
        row,
        channel,
        channel + jnp.arange(LANES) < x.shape[2],
        jnp.arange(_padded(states)) < states,
        channel // (x.shape[2] // groups),
    )


def _padded(states: int) -> int:
    """The number of states in registers, a power of two."""
    return max(2, pl.next_power_of_2(states))


def _channels(at: Place) -> Any:
    return pl.ds(at.channel, LANES)


def _series(ref: Any, at: Place, step: Any) -> jax.Array:
    """A step of an array (b, t, d), float32."""
    view = ref.at[at.row, step, _channels(at)]
    return pltriton.load(view, mask=at.channels, other=0).astype(jnp.float32)


def _vector(ref: Any, at: Place, step: Any) -> jax.Array:
    """A step of an array (b, t, g, n), float32."""
    view = ref.at[at.row, step, at.group, pl.ds(jnp.int32(0), at.states.shape[0])]
    return pltriton.load(view, mask=at.states, other=0).astype(jnp.float32)


def _matrix(ref: Any, at: Place, *index: Any) -> jax.Array:
    """A state (n, lanes) of an array (..., n, d), float32."""
    view = ref.at[*index, pl.ds(jnp.int32(0), at.states.shape[0]), _channels(at)]
    return pltriton.load(view, mask=_both(at), other=0).astype(jnp.float32)


def _put_matrix(ref: Any, value: jax.Array, at: Place, *index: Any) -> None:
    view = ref.at[*index, pl.ds(jnp.int32(0), at.states.shape[0]), _channels(at)]
    pltriton.store(view, value.astype(ref.dtype), mask=_both(at))


def _both(at: Place) -> jax.Array:
    return at.states[:, None] & at.channels[None]


def _of_channels(ref: Any, at: Place) -> jax.Array:
    """An array (d,)."""
    return pltriton.load(ref.at[_channels(at)], mask=at.channels, other=0)


def _loaded(refs: dict[str, Any], at: Place, first: Any) -> list[tuple[jax.Array, ...]]:
    """The inputs of a span as they are in memory; steps beyond the end repeat the last one."""
    found = []
    for step in range(SPAN):
        step = jnp.minimum(first + step, refs["x"].shape[1] - 1)
        inputs = [_series(refs[name], at, step) for name in ("dt", "x")]
        inputs += [_vector(refs[name], at, step) for name in ("b", "c")]
        if refs["flags"] is not None:
            inputs.append(refs["flags"][at.row, step])
        found.append(tuple(inputs))
    return found


def _steps(loaded: Any, first: Any, time: int, bias: Any, softplus: bool) -> list[Step]:
    """The inputs of a span; steps beyond the end and padding leave the state as it is."""
    steps = []
    for step, (dt, x, b, c, *flags) in enumerate(loaded):
        dt, slope = step_sizes(dt, bias, softplus)
        real, start = first + step < time, None
        if flags:
            real, start = real & (flags[0] != PADDING), real & (flags[0] == START)
        dt, slope, x = (jnp.where(real, v, 0.0) for v in (dt, slope, x))
        steps.append(Step(dt, slope, x, b[:, None], c[:, None], start))
    return steps


def step_sizes(dt: jax.Array, bias: Any, softplus: bool) -> tuple[jax.Array, jax.Array]:
    """Returns step sizes, and their derivatives with respect to what the call gives for them."""
    if bias is not None:
        dt = dt + bias
    slope = jnp.ones_like(dt)
    if softplus:
        slope = 1.0 / (1.0 + jnp.exp(-dt))
        dt = jnp.maximum(dt, 0.0) + _log1p(jnp.exp(-jnp.abs(dt)))
    return dt, slope


def _log1p(u: jax.Array) -> jax.Array:
    """log(1 + u) for u in [0, 1]; where u is small, a series keeps the digits that 1 + u would lose."""
    series = u * (1.0 - u * (1 / 2 - u * (1 / 3 - u * (1 / 4 - u / 5))))
    return jnp.where(u < 0.02, series, jnp.log(1.0 + u))


def _entering(step: Step, h: jax.Array) -> jax.Array:
    return h if step.start is None else jnp.where(step.start, 0.0, h)


def _after(step: Step, a: jax.Array, h: jax.Array) -> jax.Array:
    """The state after a step; a is in units of log2."""
    return jnp.exp2(step.dt[None] * a) * _entering(step, h) + (step.dt * step.x)[None] * step.b


def forward(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    bias: jax.Array | None,
    flags: jax.Array | None,
    state: jax.Array,
    *,
    softplus: bool,
    keeping: bool,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns the outputs (b, t, d), float32, the last state (b, n, d), and the states before spans, (b, spans, n, d), or None.

    Args:
      x, dt: (b, t, d); a: (n, d), float32; b, c: (b, t, g, n); bias: (d,), float32, or None.
      flags: (b, t), `START`, `PADDING` or 0, int32; None for whole rows.
      state: (b, n, d), float32.
      softplus: whether softplus(dt + bias) replaces dt + bias.
    """
    batch, time, channels = x.shape
    spans = pl.cdiv(time, SPAN)

    def body(*, x, dt, a, b, c, bias, flags, state, y, final, borders=None):
        at, refs = _place(x, b), {"x": x, "dt": dt, "b": b, "c": c, "flags": flags}
        rates = LOG2_E * _matrix(a, at)
        shift = None if bias is None else _of_channels(bias, at)

        def span(number, carry):
            h, loaded = carry
            first = number * SPAN
            if borders is not None:
                _put_matrix(borders, h, at, at.row, number)
            coming = _loaded(refs, at, first + SPAN)
            for offset, step in enumerate(_steps(loaded, first, time, shift, softplus)):
                h = _after(step, rates, h)
                out = (h * step.c).sum(0)
                view = y.at[at.row, jnp.minimum(first + offset, time - 1), _channels(at)]
                pltriton.store(view, out, mask=at.channels & (first + offset < time))
            return h, coming

        carry = _matrix(state, at, at.row), _loaded(refs, at, 0)
        h, _ = jax.lax.fori_loop(0, spans, span, carry)
        _put_matrix(final, h, at, at.row)

    outputs = {
        "y": jax.ShapeDtypeStruct(x.shape, jnp.float32),
        "final": jax.ShapeDtypeStruct(state.shape, jnp.float32),
    }
    if keeping:
        outputs["borders"] = jax.ShapeDtypeStruct((batch, spans, *a.shape), x.dtype)
    found = launch(
        body,
        name="selective_scan",
        grid=(pl.cdiv(channels, LANES), batch),
        inputs={"x": x, "dt": dt, "a": a, "b": b, "c": c, "bias": bias, "flags": flags, "state": state},
        outputs=outputs,
        warps=1,
    )
    return found["y"], found["final"], found.get("borders")


def backward(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    bias: jax.Array | None,
    flags: jax.Array | None,
    borders: jax.Array,
    dy: jax.Array,
    dfinal: jax.Array,
    *,
    softplus: bool,
) -> dict[str, jax.Array]:
    """Returns gradients: dx and ddt, da and dstate (b, n, d), dbias (b, d), and db and dc (b, programs, t, n) per program.

    Args:
      borders: what `forward` keeps; the other arguments are its own, and the gradients of its results.
    """
    batch, time, channels = x.shape
    programs, spans = pl.cdiv(channels, LANES), borders.shape[1]

    def body(*, x, dt, a, b, c, bias, flags, borders, dy, dfinal, dx, ddt, da, dstate, db, dc, dbias=None):
        at, refs = _place(x, b), {"x": x, "dt": dt, "b": b, "c": c, "flags": flags}
        block = pl.program_id(0)
        rates = LOG2_E * _matrix(a, at)
        shift = None if bias is None else _of_channels(bias, at)

        def put_series(ref, value, step):
            view = ref.at[at.row, jnp.minimum(step, time - 1), _channels(at)]
            pltriton.store(view, value.astype(ref.dtype), mask=at.channels & (step < time))

        def put_vector(ref, value, step):
            view = ref.at[at.row, block, jnp.minimum(step, time - 1), pl.ds(jnp.int32(0), at.states.shape[0])]
            pltriton.store(view, value, mask=at.states & (step < time))

        def span(turn, carry):
            flowing, drates, dshift = carry
            number = spans - 1 - turn
            first = number * SPAN
            steps = _steps(_loaded(refs, at, first), first, time, shift, softplus)
            states = [_matrix(borders, at, at.row, number)]
            for step in steps:
                states.append(_after(step, rates, states[-1]))
            for offset in reversed(range(SPAN)):
                step, when = steps[offset], first + offset
                dout = jnp.where(when < time, _series(dy, at, jnp.minimum(when, time - 1)), 0.0)
                put_vector(dc, (states[offset + 1] * dout[None]).sum(1), when)
                g = step.c * dout[None] + flowing
                put_vector(db, (g * (step.dt * step.x)[None]).sum(1), when)
                dinput = (g * step.b).sum(0)
                flowing = _entering(step, g * jnp.exp2(step.dt[None] * rates))
                w = flowing * states[offset]
                drates = drates + w * step.dt[None]
                dstep = step.slope * (step.x * dinput + (w * rates).sum(0) / LOG2_E)
                dshift = dshift + dstep
                put_series(dx, step.dt * dinput, when)
                put_series(ddt, dstep, when)
            return flowing, drates, dshift

        nothing = jnp.zeros(rates.shape, jnp.float32)
        start = _matrix(dfinal, at, at.row), nothing, jnp.zeros((LANES,), jnp.float32)
        flowing, drates, dshift = jax.lax.fori_loop(0, spans, span, start)
        _put_matrix(dstate, flowing, at, at.row)
        _put_matrix(da, drates, at, at.row)
        if dbias is not None:
            pltriton.store(dbias.at[at.row, _channels(at)], dshift, mask=at.channels)

    of_states = jax.ShapeDtypeStruct((batch, *a.shape), jnp.float32)
    of_program = jax.ShapeDtypeStruct((batch, programs, time, a.shape[0]), jnp.float32)
    outputs = {
        "dx": jax.ShapeDtypeStruct(x.shape, x.dtype),
        "ddt": jax.ShapeDtypeStruct(dt.shape, dt.dtype),
        "da": of_states,
        "dstate": of_states,
        "db": of_program,
        "dc": of_program,
    }
    if bias is not None:
        outputs["dbias"] = jax.ShapeDtypeStruct((batch, channels), jnp.float32)
    return launch(
        body,
        name="selective_scan_gradients",
        grid=(programs, batch),
        inputs={
            "x": x,
            "dt": dt,
            "a": a,
            "b": b,
            "c": c,
            "bias": bias,
            "flags": flags,
            "borders": borders,
            "dy": dy,
            "dfinal": dfinal,
        },
        outputs=outputs,
        warps=1,
    )
