"""`gated_linear_attention` on Hopper GPUs.

kernels.py and backward.py hold the kernels for at most one decay per head and step, grouped.py those for many heads that
share queries and keys, channels.py those for a decay per key channel, with or without a bonus. wide.py makes the calls that the
first two take of wide heads, of sums of weights and of a bonus.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from layers.kernels import devices, head_parts, mosaic_gpu, pallas_triton, partition
from layers.kernels.gated_linear_attention.gpu import backward as backward_kernels
from layers.kernels.gated_linear_attention.gpu import (
    channels,
    grouped,
    grouped_keys,
    grouped_queries,
    kernels,
    wide,
)
from layers.kernels.gated_linear_attention.gpu.kernels import CHUNK, KEEP, PART, READ, WRITE, Gates, Settings
from layers.kernels.promotion import promoting
from layers.kernels.segments import select_real
from layers.kernels.shard_map_types import vary_as

# The fastest settings of `python -m experiments.benchmark tune`.
FORWARD = Settings()
BACKWARD = Settings()
SPAN = 8  # chunks between the states from which the backward pass derives the flow through each chunk

WIDEST = head_parts.WIDEST  # key or value features per head of the kernels
MOST_KEYS = 512  # key features per head, in parts of `WIDEST`
# Smallest batch x heads for which `impl=None` takes these kernels; the second value applies from LONG tokens.
FEWEST, FEWEST_IF_LONG, LONG = 64, 8, 2048
_PROCESSORS = 132  # of an H100
_MAX_PIECES = 64
# Clamp: exp underflows below this, and -inf would give 0 x inf = NaN.
_LOWEST = -100.0


class Call(NamedTuple):
    """The static part of a call."""

    scale: float
    heads: int
    span: int
    forward: Settings
    backward: Settings


def unsupported_reason(q, k, v, log_decay, bonus, normalize, initial_state, **_: Any) -> str | None:
    """Why these kernels cannot take a call, or None."""
    per_channel = log_decay is not None and log_decay.ndim == 4
    if per_channel and normalize:
        return "normalize=True with a decay per key channel is not implemented; use impl='xla'"
    for name, x in {"q": q, "k": k, "v": v}.items():
        if x.dtype != jnp.bfloat16:
            return f"{name} has dtype {x.dtype}, which matrix units would round; expected bfloat16"
    most = dict.fromkeys("kv", channels.WIDEST) if per_channel else {"k": MOST_KEYS}
    for name, widest in most.items():
        width = {"k": k, "v": v}[name].shape[3]
        if width > widest:
            return f"{name} has heads of {width}; expected at most {widest}"
    for name, x in {"log_decay": log_decay, "bonus": bonus, "initial_state": initial_state}.items():
        if x is not None and x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            return f"{name} has dtype {x.dtype}; expected float32 or narrower"
    if any(jax.typeof(x).sharding.spec[1] is not None for x in (q, k, v)):
        return f"v is sharded {jax.typeof(v).sharding.spec}; expected whole rows, time not sharded"
    counts = {"rows": q.shape[0]}
    if per_channel:
        heads = max(x.shape[2] for x in (q, k, v, log_decay))
        counts = {"rows times heads": q.shape[0] * heads, "chunks": -(-q.shape[1] // CHUNK)}
    for what, count in counts.items():
        if count > mosaic_gpu.MAX_GRID:
            return f"q has {count} {what}; expected at most {mosaic_gpu.MAX_GRID}"
    return pallas_triton.refusal(channels.probe) if per_channel else mosaic_gpu.refusal(_probe)


def passed_over_reason(q, k, v, log_decay=None, **_: Any) -> str | None:
    """Why `impl=None` does not take these kernels, or None.

    They need a full chunk, heads wide enough for the tensor cores, and enough programs to fill the GPU.
    """
    if devices.backend() != "gpu":
        return devices.hopper_refusal()
    if q.shape[1] < CHUNK:
        return f"q has {q.shape[1]} tokens; a chunk has {CHUNK}"
    fewest = FEWEST_IF_LONG if q.shape[1] >= LONG else FEWEST
    if log_decay is not None and log_decay.ndim == 4:
        fewest = channels.FEWEST
        if q.shape[1] < LONG:
            return f"q has {q.shape[1]} tokens; with a decay per key channel the kernels are timed from {LONG} on"
    heads = q.shape[0] * max(x.shape[2] for x in (q, k, v))
    if heads < fewest:
        return f"batch x heads is {heads}; from {fewest} on they fill the GPU"
    if k.shape[3] < 32 or v.shape[3] < 32:
        return f"keys and values have {k.shape[3]} and {v.shape[3]} features; expected at least 32"
    return partition.passed_over_reason(q)


def gated_linear_attention(
    q,
    k,
    v,
    log_decay,
    bonus,
    scale,
    normalize,
    initial_state,
    segments,
    smallest,
    *,
    forward: Settings | None = None,
    backward: Settings | None = None,
):
    """Returns outputs and the final state; the public function and `unsupported_reason` have checked the arguments.

    Args:
      forward, backward: layouts of the kernels that replace the tuned ones, without a decay per key channel.
    """
    batch, _, _, keys = q.shape
    own = 1 if log_decay is None else log_decay.shape[0 if log_decay.ndim == 1 else 2]
    own = own if bonus is None else max(own, bonus.shape[0])
    heads, width = max(*(x.shape[2] for x in (q, k, v)), own), v.shape[3] + int(normalize)
    state = jnp.zeros((batch, heads, keys, width), jnp.float32) if initial_state is None else initial_state
    per_channel = log_decay is not None and log_decay.ndim == 4
    call = Call(1.0 if normalize else scale, heads, SPAN, forward or FORWARD, backward or BACKWARD)
    rows, split = _sharding(q, k, v, heads)

    def head_axis(x, axis):
        return split if x.shape[axis] == heads else None

    arrays = {name: (x, P(rows, None, head_axis(x, 2), None)) for name, x in (("q", q), ("k", k), ("v", v))}
    arrays["state"] = state.astype(jnp.float32), P(rows, split, None, None)
    if log_decay is not None:
        g = log_decay.astype(jnp.float32)
        g = g if per_channel else jnp.maximum(g, _LOWEST)
        g = g[None, None] if g.ndim == 1 else g
        arrays["g"] = g, P(rows if g.shape[0] > 1 else None, None, head_axis(g, 2), *[None] * per_channel)
    if bonus is not None:
        arrays["bonus"] = bonus.astype(jnp.float32), P(head_axis(bonus, 0), None)
    if segments is not None:
        arrays["segments"] = segments, P(rows, None)
    smallest = smallest if normalize else None

    def run(*given):
        leaves = jax.tree.leaves(given)
        given = jax.tree.map(lambda x: vary_as(x, *leaves), given)
        local = dict(zip(arrays, given, strict=True))
        if per_channel:
            return _by_channel(scale, **local)
        return wide.attend(functools.partial(_padded, call), call.scale, smallest, **local)

    out_specs = P(rows, None, split, None), P(rows, split, None, None)
    return partition.over_shards(run, *zip(*arrays.values(), strict=True), out_specs)


def _sharding(q, k, v, heads):
    """Mesh axes that divide rows and heads as those of v; heads only where all arrays have as many, or one."""
    rows, _, split, _ = partition.spec_of(v, heads=2)
    if v.shape[2] != heads or any(x.shape[2] not in (1, heads) for x in (q, k)):
        split = None
    return rows, split


def _padded(call, q, k, v, g, number, state):
    """Runs heads of at most `WIDEST` features, with keys and values padded to multiples of 64 and time to multiples of 8."""
    time, keys, width = q.shape[1], q.shape[3], v.shape[3]
    missing = -time % 8
    pads = ((0, 0), (0, missing), (0, 0))
    q, k, v = (_pad(x, (*pads, (0, -x.shape[3] % PART))) for x in (q, k, v))
    state = _pad(state, ((0, 0), (0, 0), (0, -keys % PART), (0, -width % PART)))
    g = None if g is None else _pad(g, pads)
    number = None if number is None else _pad(number, pads[:2])
    o, final = _attend(q, k, v, g, number, state, call._replace(heads=state.shape[1]))
    return o[:, :time, :, :width], final[:, :, :keys, :width]


def _by_channel(scale, q, k, v, g, state, bonus=None, segments=None):
    """As `_padded`, with a decay per key channel, g (b or 1, t or 1, h or 1, k); nothing is padded."""
    q, k, v = (select_real(x, segments) for x in (q, k, v))
    g = select_real(jnp.broadcast_to(g, (*q.shape[:2], state.shape[1], q.shape[3])), segments)
    number = segments.numbers if segments is not None and segments.packed else None
    if bonus is not None:
        bonus = jnp.broadcast_to(bonus, (state.shape[1], q.shape[3]))
    return channels.attend(q, k, v, g, bonus, number, state, scale)


def _pad(x, pads):
    return jnp.pad(x, pads) if any(after for _, after in pads) else x


def gates(g, number, batch: int, time: int, call: Call) -> Gates:
    """Returns `Gates`; g (b, t, h) is the log-decay, number (b, t) the segment number per step."""
    count = -(-time // CHUNK)
    missing = count * CHUNK - time
    shape = (batch, call.heads, count, CHUNK)
    sums = jnp.zeros(shape, jnp.float32)
    if g is not None:
        g = jnp.pad(g, ((0, 0), (0, missing), (0, 0))) * math.log2(math.e)
        sums = jnp.cumsum(g.swapaxes(1, 2).reshape(shape), axis=-1)
    total = sums[..., -1:]
    read, write = call.scale * jnp.exp2(sums), jnp.exp2(jnp.minimum(total - sums, 0))
    keep = jnp.broadcast_to(jnp.exp2(total), shape)
    if number is None:
        return Gates(jnp.stack([sums, read, write, keep], axis=3), sums[:, :, :, None])
    number = jnp.pad(number, ((0, 0), (0, missing))).reshape(batch, 1, count, CHUNK)
    leaving = jnp.maximum(jax.lax.cummax(number.max(3, keepdims=True), axis=2), 1)
    entering = jnp.pad(leaving, ((0, 0), (0, 0), (1, 0), (0, 0)), constant_values=1)[:, :, :-1]
    rows = [
        sums,
        jnp.where(number == entering, read, 0),
        jnp.where(number == leaving, write, 0),
        jnp.where(entering == leaving, keep, 0),
        jnp.broadcast_to(jnp.where(number == 0, -1, number), shape).astype(jnp.float32),
    ]
    columns = jnp.broadcast_to(jnp.where(number == 0, -2, number), shape).astype(jnp.float32)
    return Gates(jnp.stack(rows, axis=3), jnp.stack([sums, columns], axis=3))


def piece_length(chunks: int, blocks: int, span: int, settings: Settings) -> int:
    """Chunks per piece of the time axis: all of them if one piece per row and head fills the GPU, else whole spans."""
    spans = -(-chunks // span)
    pieces = settings.pieces or (1 if 2 * blocks > _PROCESSORS else _PROCESSORS // blocks)
    pieces = min(pieces, spans, _MAX_PIECES)
    return chunks if pieces == 1 else span * -(-spans // pieces)


def _at_pieces(x, y, given: Gates, factor, edge, length, settings, *, reverse):
    """The states at which pieces start, in walking order, (b, pieces, h, k, v); `edge` is the first, (b, h, k, v)."""
    if length == given.chunks:
        return edge[:, None]
    added = kernels.effects(x, y, given, factor, reverse, length, settings)
    keep = given.rows[:, :, :, KEEP, 0]
    keep = jnp.pad(keep, ((0, 0), (0, 0), (0, -keep.shape[2] % length)), constant_values=1)
    keep = keep.reshape(*keep.shape[:2], -1, length).prod(-1)

    def step(state, piece):
        keep, added = piece
        return keep[..., None, None] * state + added, state

    pieces = jnp.moveaxis(keep, 2, 0), jnp.moveaxis(added, 1, 0)
    _, states = jax.lax.scan(step, edge, pieces, reverse=reverse, unroll=8)
    return jnp.moveaxis(states, 0, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, g, number, state, call):
    """Outputs (b, t, h, v), in the type of v, and the final state (b, h, k, v), float32."""
    o, states = forward(q, k, v, g, number, state, call, None)
    return o, states[:, :, -1]


@mosaic_gpu.lowered_once("call", "span")
def forward(q, k, v, g, number, state, call, span):
    """Returns outputs, and states as `kernels.forward` gives them."""
    batch, time, settings = q.shape[0], q.shape[1], call.forward
    given = gates(g, number, batch, time, call)
    if grouped.in_pairs(q, k, v, call.heads, settings):
        length = piece_length(given.chunks, batch * call.heads // grouped.WARPGROUPS, call.span, settings)
        entering = _at_pieces(k, v, given, WRITE, state, length, settings, reverse=False)
        scored = grouped.scores(q, k, number, call.scale)
        return grouped.forward(q, k, v, given, scored, entering, span, length, settings)
    parts = v.shape[3] // PART
    count = kernels.warpgroups(*(call.heads // x.shape[2] for x in (q, k)), parts=parts)
    length = piece_length(given.chunks, batch * call.heads * parts // count, call.span, settings)
    entering = _at_pieces(k, v, given, WRITE, state, length, settings, reverse=False)
    return kernels.forward(q, k, v, given, entering, call.scale, span, length, settings)


def _forward(q, k, v, g, number, state, call):
    length = layout_backward(q, k, v, call)[1]
    o, states = forward(q, k, v, g, number, state, call, length)
    return (o, states[:, :, -1]), (q, k, v, g, number, states)


def layout_backward(q, k, v, call):
    """Returns whether programs take two heads of a group, and the chunks per piece."""
    paired = grouped.in_pairs(q, k, v, call.heads, call.backward)
    paired = paired and k.shape[3] == grouped_queries.KEYS
    blocks = q.shape[0] * call.heads // (grouped_queries.HEADS if paired else 1)
    return paired, piece_length(-(-q.shape[1] // CHUNK), blocks, call.span, call.backward)


@mosaic_gpu.lowered_once("call")
def gradients(call, residuals, cotangents):
    """The backward pass, from (q, k, v, g, number, states) and the gradients of outputs and the final state.

    The first states are those at the start of every piece, see `layout_backward`.
    """
    q, k, v, g, number, states = residuals
    do, dfinal = cotangents
    batch, time, span, settings = q.shape[0], q.shape[1], call.span, call.backward
    given = gates(g, number, batch, time, call)
    paired, length = layout_backward(q, k, v, call)
    queries_kernel, keys_kernel = backward_kernels.query_gradients, backward_kernels.key_value_gradients
    scored, swapped = (), ()
    if paired:
        queries_kernel = grouped_queries.query_gradients
        keys_kernel = grouped_keys.key_value_gradients
        scored = (grouped.scores(q, k, number, call.scale),)
        swapped = (scored[0].swapaxes(3, 4),)
    dq, queries, ends = queries_kernel(
        q, k, v, do, given, *scored, states, call.scale, span, length, settings
    )
    # The interpreter cannot run two kernels at once.
    do, dq, queries = jax.lax.optimization_barrier((do, dq, queries))
    dleaving = _at_pieces(q, do, given, READ, dfinal, length, settings, reverse=True)
    dk, dv, keys, written, flows, dstate = keys_kernel(
        q, k, v, do, given, *swapped, ends, dleaving, call.scale, span, length, settings
    )
    dg = None
    if g is not None:
        total, read = jnp.moveaxis(queries.sum(2), 3, 0)
        through = _flows(flows.sum(-1), read.sum(-1), written.sum(-1), span)
        # In the chunk itself, what was written before a step counts as it does in `dk`.
        sums = jax.lax.cumsum(total - keys[:, :, :, 0], axis=3, reverse=True)
        sums += (keys[:, :, :, 1].sum(-1) + through)[..., None]
        dg = sums.reshape(batch, call.heads, -1).swapaxes(1, 2)[:, :time]
    dq, dk, dv = (channels.summed(dx, x.shape[2]) for dx, x in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv, dg, None, dstate


_attend.defvjp(promoting(_forward), promoting(gradients))


def _flows(ends, read, written, span):
    """The flow through every chunk (b, h, n), from the flows through the ends of spans (b, h, s).

    The flow through the end of a chunk is what passed through the chunk plus what it wrote. The flow through its start is
    what passed plus what the chunk read.
    """
    chunks = read.shape[2]
    missing = ends.shape[2] * span - chunks

    def by_span(x):
        x = jnp.pad(x, ((0, 0), (0, 0), (0, missing))).reshape(*ends.shape, span)
        return jnp.moveaxis(x, 3, 0)[::-1]

    passed, flow = [], ends
    for read_, written_ in zip(by_span(read), by_span(written), strict=True):
        passed.append(flow - written_)
        flow = passed[-1] + read_
    return jnp.stack(passed[::-1], axis=3).reshape(*read.shape[:2], -1)[:, :, :chunks]


def _probe() -> None:
    """Lowers both passes of small calls: of a single head, and of many heads that share queries and keys."""

    def loss(q, k, v, g, number, state):
        call = Call(1.0, v.shape[2], SPAN, FORWARD, BACKWARD)
        o, final = _attend(q, k, v, g, number, state, call)
        return o.sum() + final.sum()

    shared = jax.ShapeDtypeStruct((1, 16, 1, WIDEST), jnp.bfloat16)
    number = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    for heads, width in ((1, WIDEST), (grouped.FEWEST, PART)):
        v = jax.ShapeDtypeStruct((1, 16, heads, width), jnp.bfloat16)
        g = jax.ShapeDtypeStruct((1, 16, heads), jnp.float32)
        state = jax.ShapeDtypeStruct((1, heads, WIDEST, width), jnp.float32)
        traced = jax.jit(jax.grad(loss, (0, 1, 2, 3, 5))).trace(shared, shared, v, g, number, state)
        traced.lower(lowering_platforms=("cuda",))
