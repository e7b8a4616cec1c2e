"""The Triton kernels of `selective_scan`: h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t^T, y_t = h_t c_t, and its gradients.

A program is one warp: it takes 32 channels of one row and one piece of time, a lane one channel with all its states in registers,
and walks through its piece. Inputs of the next step are loaded while this one is computed.

Pieces make enough programs to fill the GPU where rows and channels do not. `effects` computes what every piece adds to a state
and the sum of its step sizes, whose product with a is the logarithm of its decay; `entering` composes these to the state before every
piece.

The backward pass walks from the end. The forward pass keeps the states before every span, from which those within are
computed again, into registers, and the adjoint recurrence runs back through them:

    g_t = c_t dy_t + exp(dt_{t+1} a) g_{t+1},    w_t = g_t exp(dt_t a) h_{t-1},
    dx_t = dt_t sum_n(g_t b_t),    ddt_t = x_t sum_n(g_t b_t) + sum_n(w_t a),
    db_t = sum_d(g_t dt_t x_t),    dc_t = sum_d(dy_t h_t),    da = sum_t(w_t dt_t).

Pieces compose from the end in the same way. Sums over channels leave once per program: the lanes exchange half of their summands until
each holds one sum.

Per channel, state and step an exponential is computed once in each walk: at 8 x 4096 tokens and 4096 channels of 16 states 0.6 ms on an
H100, which computes 16 per cycle and processor. A pass in pieces has two walks, and the backward pass computes one more.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels.pallas_triton import launch, pl, pltriton
from layers.kernels.selective_scan.gpu.kernels import LOG2_E, PADDING, SPAN, START, step_sizes
from layers.kernels.triton_ptx import LANES, in_one_operation, of_lanes

States = list[jax.Array]  # one (lanes,) per state of a channel


class Series(NamedTuple):
    """The inputs as they are in memory, or refs of them.

    Attributes:
      x, dt: (b, t, d).
      vectors: (b, t, g, lanes), float32, b and c as `packed` gives them.
      bias: (d,), float32, or None.
      flags: (b, t), `START`, `PADDING` or 0, int32; None for whole rows.
    """

    x: Any
    dt: Any
    vectors: Any
    bias: Any
    flags: Any


class Step(NamedTuple):
    """The inputs of a step, float32.

    Attributes:
      dt, x: (lanes,), the step size and the input, 0 on padding.
      slope: (lanes,), the derivative of the step size with respect to what the call gives for it.
      start: (lanes,), 1 where the state is reset, else 0; or None.
      place: the step, at most the last one.
      real: whether the step exists.
    """

    dt: jax.Array
    slope: jax.Array
    x: jax.Array
    start: jax.Array | None
    place: Any
    real: Any


class Place(NamedTuple):
    """What a program works at: its row, piece and first channel, the channels that exist, and their group of b and c."""

    row: Any
    piece: Any
    channel: Any
    exist: jax.Array
    group: Any
    states: int


def place(x: Any, a: Any, vectors: Any) -> Place:
    """Returns the place of this program."""
    block, piece, row = (pl.program_id(axis) for axis in range(3))
    channel = block * LANES
    group = channel // (x.shape[2] // vectors.shape[2])
    return Place(row, piece, channel, channel + jnp.arange(LANES) < x.shape[2], group, a.shape[0])


def _channels(at: Place) -> Any:
    return pl.ds(at.channel, LANES)


def load(ref: Any, at: Place, *index: Any) -> jax.Array:
    """Channels of an array (..., d)."""
    return pltriton.load(ref.at[*index, _channels(at)], mask=at.exist, other=0)


def store(ref: Any, value: jax.Array, at: Place, *index: Any, where: Any = True) -> None:
    """Writes channels of an array (..., d)."""
    pltriton.store(ref.at[*index, _channels(at)], value.astype(ref.dtype), mask=at.exist & where)


def load_states(ref: Any, at: Place, *index: Any) -> States:
    """States of an array (..., n, d), float32."""
    return [load(ref, at, *index, jnp.int32(n)).astype(jnp.float32) for n in range(at.states)]


def store_states(ref: Any, values: States, at: Place, *index: Any, where: Any = True) -> None:
    """Writes states of an array (..., n, d)."""
    for n, value in enumerate(values):
        store(ref, value, at, *index, jnp.int32(n), where=where)


def rates_of(a: Any, at: Place) -> States:
    """Rates of decay, in units of log2."""
    return [LOG2_E * rate for rate in load_states(a, at)]


def packed(b: jax.Array, c: jax.Array) -> jax.Array:
    """Returns b and c (..., n) in float32 side by side, each padded to a power of two, and both to whole vectors of lanes."""
    width, room = padded(b.shape[-1]), LANES * _parts(b.shape[-1])
    both = jnp.zeros((*b.shape[:-1], room), jnp.float32)
    return both.at[..., : b.shape[-1]].set(b).at[..., width : width + b.shape[-1]].set(c)


def padded(states: int) -> int:
    """Returns the number of states rounded up to a power of two."""
    return pl.next_power_of_2(states)


def _parts(states: int) -> int:
    """The number of vectors of lanes that hold b and c."""
    return pl.cdiv(2 * padded(states), LANES)


def vectors_of(ref: Any, at: Place, step: Any) -> tuple[States, States]:
    """b and c of a step, each number in all lanes."""
    parts = []
    for part in range(_parts(at.states)):
        lanes = pl.ds(jnp.int32(part * LANES), LANES)
        parts.append(pltriton.load(ref.at[at.row, step, at.group, lanes]))
    width = padded(at.states)
    found = [number for part in parts for number in of_lanes(part)]
    return found[: at.states], found[width : width + at.states]


def load_step(arrays: tuple[Any, ...], at: Place, step: Any) -> tuple[jax.Array, ...]:
    """A step of arrays (b, t, d); the last one beyond the end, and the first one before the start."""
    place = jnp.clip(step, 0, arrays[0].shape[1] - 1)
    return tuple(load(ref, at, at.row, place) for ref in arrays)


def prepared(loaded: Any, series: Series, bias: Any, at: Place, number: Any, softplus: bool) -> Step:
    """The inputs of a step; one beyond the end and padding leave the state as it is."""
    time, (x, dt, *_) = series.x.shape[1], loaded
    real, place = number < time, jnp.minimum(number, time - 1)
    dt, x = dt.astype(jnp.float32), x.astype(jnp.float32)
    dt, slope = step_sizes(dt, bias, softplus)
    taken, start = real, None
    if series.flags is not None:
        flag = series.flags[at.row, place]
        taken = real & (flag != PADDING)
        # Not jnp.where(..., 1.0, 0.0), which Pallas's Triton backend lowers to a boolean where the condition is a scalar.
        start = jnp.full((LANES,), (real & (flag == START)).astype(jnp.float32))
    dt, slope, x = (jnp.where(taken, v, 0.0) for v in (dt, slope, x))
    return Step(dt, slope, x, start, place, real)


def entering_states(start: jax.Array | None, h: States) -> States:
    """States as the step that follows finds them; `start` is 1 where they are reset."""
    return h if start is None else [jnp.where(start > 0.5, 0.0, v) for v in h]


def after(step: Step, rates: States, h: States, b: States) -> States:
    """Returns the states after a step."""

    def states(dt, x, start, rates, h, b):
        written, h = dt * x, entering_states(start, h)
        return [
            jnp.exp2(dt * rate) * v + written * weight for rate, v, weight in zip(rates, h, b, strict=True)
        ]

    return in_one_operation(states, step.dt, step.x, step.start, rates, h, b)


def with_output(flowing: States, c: States, dout: jax.Array) -> States:
    """Returns the gradients of the states after a step, from those of later steps and that of its output."""
    return [v + weight * dout for v, weight in zip(flowing, c, strict=True)]


def before(step: Step, rates: States, g: States) -> States:
    """Returns the gradients of the states before a step, from those after it."""

    def flowing(dt, start, rates, g):
        return entering_states(start, [jnp.exp2(dt * rate) * v for rate, v in zip(rates, g, strict=True)])

    return in_one_operation(flowing, step.dt, step.start, rates, g)


def _weighted(h: States, c: States) -> jax.Array:
    return sum(v * weight for v, weight in zip(h, c, strict=True))


def effects(
    series: Series, a: jax.Array, dy: jax.Array | None, *, softplus: bool, length: int
) -> tuple[jax.Array, jax.Array]:
    """Returns sums of step sizes per piece (b, pieces, d), -1 where the state is reset, and what it adds to the state (b, pieces, n, d).

    With the gradients of outputs, dy (b, t, d), what a piece adds to the gradient of the state before it.
    """
    batch, time, channels = series.x.shape
    pieces, backward = pl.cdiv(time, length), dy is not None

    def body(*, x, dt, vectors, bias, flags, a, dy, sums, added):
        given = Series(x, dt, vectors, bias, flags)
        at = place(x, a, vectors)
        rates, shift = rates_of(a, at), None if bias is None else load(bias, at)
        arrays = (x, dt, dy) if backward else (x, dt)
        start = at.piece * length

        def number_of(turn):
            return start + (length - 1 - turn if backward else turn)

        def one(turn, carry):
            h, total, reset, loaded = carry
            coming = load_step(arrays, at, number_of(turn + 1))
            step = prepared(loaded, given, shift, at, number_of(turn), softplus)
            write, read = vectors_of(vectors, at, step.place)
            if backward:
                out = jnp.where(step.real, loaded[2].astype(jnp.float32), 0.0)
                h = before(step, rates, in_one_operation(with_output, h, read, out))
            else:
                h = after(step, rates, h, write)
            reset = reset if step.start is None else jnp.maximum(reset, step.start)
            return h, total + step.dt, reset, coming

        zero = jnp.zeros((LANES,), jnp.float32)
        reset = None if flags is None else zero
        carry = [zero] * at.states, zero, reset, load_step(arrays, at, number_of(0))
        h, total, reset, _ = jax.lax.fori_loop(0, length, one, carry)
        store(sums, total if reset is None else jnp.where(reset > 0, -1.0, total), at, at.row, at.piece)
        store_states(added, h, at, at.row, at.piece)

    found = launch(
        body,
        name=f"selective_scan_effects{'_backward' if backward else ''}",
        grid=(pl.cdiv(channels, LANES), pieces, batch),
        inputs={**series._asdict(), "a": a, "dy": dy},
        outputs={
            "sums": jax.ShapeDtypeStruct((batch, pieces, channels), jnp.float32),
            "added": jax.ShapeDtypeStruct((batch, pieces, *a.shape), jnp.float32),
        },
        warps=1,
    )
    return found["sums"], found["added"]


def entering(
    sums: jax.Array, added: jax.Array, a: jax.Array, edge: jax.Array, *, reverse: bool = False
) -> jax.Array:
    """Returns the state before every piece (b, pieces, n, d), from what `effects` returns and that before the first, (b, n, d).

    With `reverse`, the gradient of the state after every piece, from that after the last.
    """
    batch, pieces, states, channels = added.shape

    def body(*, sums, added, a, edge, found):
        block, state, row = (pl.program_id(axis) for axis in range(3))
        at = Place(row, None, block * LANES, block * LANES + jnp.arange(LANES) < channels, None, states)
        rate = LOG2_E * load(a, at, state)

        def one(turn, h):
            piece = pieces - 1 - turn if reverse else turn
            store(found, h, at, row, piece, state)
            total, more = load(sums, at, row, piece), load(added, at, row, piece, state)
            return jnp.where(total < 0, 0.0, jnp.exp2(total * rate) * h) + more

        jax.lax.fori_loop(0, pieces, one, load(edge, at, row, state))

    return launch(
        body,
        name="selective_scan_entering",
        grid=(pl.cdiv(channels, LANES), states, batch),
        inputs={"sums": sums, "added": added, "a": a, "edge": edge},
        outputs={"found": jax.ShapeDtypeStruct(added.shape, jnp.float32)},
        warps=1,
    )["found"]


def forward(
    series: Series, a: jax.Array, state: jax.Array, *, softplus: bool, length: int, keeping: bool
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns the outputs (b, t, d), float32, the last state (b, n, d), and the states before spans, (b, spans, n, d), or None.

    Args:
      a: (n, d), float32; state: (b, n, d), float32.
      softplus: whether softplus(dt + bias) replaces dt + bias.
      length: steps per piece, a multiple of `SPAN`.
    """
    batch, time, channels = series.x.shape
    pieces, spans = pl.cdiv(time, length), length // SPAN
    states = state[:, None]
    if pieces > 1:
        states = entering(*effects(series, a, None, softplus=softplus, length=length), a, state)

    def body(*, x, dt, vectors, bias, flags, a, states, y, final, borders=None):
        given, at = Series(x, dt, vectors, bias, flags), place(x, a, vectors)
        rates, shift = rates_of(a, at), None if bias is None else load(bias, at)
        start = at.piece * length
        loaded = load_step((x, dt), at, start)
        h = load_states(states, at, at.row, at.piece)

        def one(number, carry):
            h, loaded = carry
            coming = load_step((x, dt), at, number + 1)
            step = prepared(loaded, given, shift, at, number, softplus)
            write, read = vectors_of(vectors, at, step.place)
            h = after(step, rates, h, write)
            out = in_one_operation(_weighted, h, read)
            store(y, out, at, at.row, step.place, where=step.real)
            return h, coming

        def span(number, carry):
            if borders is not None:
                store_states(borders, carry[0], at, at.row, at.piece * spans + number)
            first = start + number * SPAN
            return jax.lax.fori_loop(first, first + SPAN, one, carry)

        h, _ = jax.lax.fori_loop(0, spans, span, (h, loaded))
        store_states(final, h, at, at.row, where=at.piece == pieces - 1)

    outputs = {
        "y": jax.ShapeDtypeStruct(series.x.shape, jnp.float32),
        "final": jax.ShapeDtypeStruct(state.shape, jnp.float32),
    }
    if keeping:
        outputs["borders"] = jax.ShapeDtypeStruct((batch, pieces * spans, *a.shape), series.x.dtype)
    found = launch(
        body,
        name="selective_scan",
        grid=(pl.cdiv(channels, LANES), pieces, batch),
        inputs={**series._asdict(), "a": a, "states": states},
        outputs=outputs,
        warps=1,
    )
    return found["y"], found["final"], found.get("borders")
