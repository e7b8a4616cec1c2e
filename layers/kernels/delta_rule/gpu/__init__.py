"""`delta_rule` and `dplr_delta_rule` on Hopper GPUs.

With no decay or one per head, the kernels and what bounds them are in forward.py, backward.py and gradients.py, the walk that the
first two share is in chain.py, and pieces.py cuts time into pieces for them, which over_time.py joins over devices. Wide values
are several heads for all but `prepare`, see `head_parts`. channels.py holds the kernels for a decay per key channel, which
`dplr_delta_rule` takes for every decay.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from layers.kernels import devices, head_parts, mosaic_gpu, pallas_triton, partition
from layers.kernels.delta_rule.gpu import backward as backward_kernel
from layers.kernels.delta_rule.gpu import channels, over_time
from layers.kernels.delta_rule.gpu import forward as forward_kernels
from layers.kernels.delta_rule.gpu import gradients as gradient_kernel
from layers.kernels.delta_rule.gpu import pieces as time_pieces
from layers.kernels.delta_rule.gpu.tiles import BLOCK, CHUNK
from layers.kernels.delta_rule.unit_norm import normalized
from layers.kernels.promotion import promoting
from layers.kernels.segments import select_real
from layers.kernels.sequence_parallel import of_first
from layers.kernels.shard_map_types import vary_as

# Shortest calls and smallest batch x heads for which `impl=None` takes these kernels; the second value applies from LONG
# tokens.
SHORTEST, LONG = 128, 2048
FEWEST, FEWEST_IF_LONG = 64, 8
WIDEST = 128  # key features per head
ROWS = 8  # tokens per tile of shared memory; copies take whole tiles

# Clamp: exp underflows to 0 in bfloat16 below this, and sums over a chunk keep their digits.
STRONGEST = -100.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """The layout of the kernels.

    Attributes:
      keep: whether the forward pass keeps the states of all chunks for the backward pass, which otherwise recomputes them.
        With 128 key and value features per head they take twice the memory of q.
      refinements, workers: see `forward_kernels.prepare`.
      forward, states, backward: chunks of inputs that the walks of both passes have in shared memory, in flight or in use;
        `states` is for a walk that recomputes states.
      turns: see `gradient_kernel.chunk_gradients`.
      pieces: number of pieces of the time axis, walked concurrently; by `time_pieces.piece_length` if None.
    """

    keep: bool = True
    refinements: int = 1
    workers: int = 4
    forward: int = 3
    states: int = 3
    backward: int = 2
    turns: int = 16
    pieces: int | None = None

    @property
    def forward_keeping(self) -> int:
        """`forward`, reduced to leave room for states on their way out."""
        return min(self.forward, 2)


SETTINGS = Settings()


def unsupported_reason(q, k, v, beta, log_decay, initial_state, **_: Any) -> str | None:
    """Why these kernels cannot take a call of `delta_rule`, or None."""
    numbers = {"beta": beta, "log_decay": log_decay, "initial_state": initial_state}
    reason = _refused({"q": q, "k": k, "v": v}, numbers)
    if reason is not None:
        return reason
    if log_decay is not None and log_decay.ndim == 4:
        return _refused_by_channel(v)
    parts = v.shape[2] * head_parts.value_parts(v.shape[3]).count
    if max(v.shape[0], parts) > mosaic_gpu.MAX_GRID:
        return f"v has {v.shape[0]} rows of {parts} parts of heads; expected at most {mosaic_gpu.MAX_GRID} of either"
    return mosaic_gpu.refusal(_probe)


def dplr_unsupported_reason(q, k, v, a, b, log_decay, initial_state, **_: Any) -> str | None:
    """Why these kernels cannot take a call of `dplr_delta_rule`, or None."""
    numbers = {"log_decay": log_decay, "initial_state": initial_state}
    return _refused({"q": q, "k": k, "v": v, "a": a, "b": b}, numbers) or _refused_by_channel(v)


def _refused(wide: dict[str, jax.Array], numbers: dict[str, jax.Array | None]) -> str | None:
    """Why no kernel takes arrays (b, t, heads, width), k and v among them, and the other arguments, or None."""
    k, v = wide["k"], wide["v"]
    for name, array in numbers.items():
        if array is not None and array.dtype == jnp.float64:
            return f"{name} has dtype float64; expected float32 or narrower"
    for name, array in wide.items():
        if array.dtype != jnp.bfloat16:
            return f"{name} has dtype {array.dtype}; expected bfloat16, as matrix units take it"
    if k.shape[-1] > WIDEST:
        return f"k has {k.shape[-1]} features a head; expected at most {WIDEST}, since the rule mixes them"
    if jax.typeof(v).sharding.spec[1] is not None:
        return f"v is sharded {jax.typeof(v).sharding.spec}; expected whole rows, time not sharded"
    return None


def _refused_by_channel(v: jax.Array) -> str | None:
    """Why the kernels for a decay per key channel cannot take values of this shape, or run here, or None."""
    counts = {"rows times heads": v.shape[0] * v.shape[2], "chunks": -(-v.shape[1] // CHUNK)}
    for what, count in counts.items():
        if count > mosaic_gpu.MAX_GRID:
            return f"v has {count} {what}; expected at most {mosaic_gpu.MAX_GRID}"
    return pallas_triton.refusal(channels.probe)


def passed_over_reason(v, log_decay=None, **_: Any) -> str | None:
    """Why `impl=None` does not take these kernels, or None. Short calls and those with few heads are left to XLA."""
    batch, time, heads, _ = v.shape
    fewest = FEWEST_IF_LONG if time >= LONG else FEWEST
    if devices.backend() != "gpu":
        return devices.hopper_refusal()
    if log_decay is not None and log_decay.ndim == 4:
        return _passed_over_by_channel(v)
    if time < SHORTEST:
        return f"v has {time} tokens; the kernels are timed from {SHORTEST} on"
    if batch * heads < fewest:
        return f"batch x heads is {batch * heads}; from {fewest} on they fill the GPU"
    return partition.passed_over_reason(v)


def dplr_passed_over_reason(v, **_: Any) -> str | None:
    """`passed_over_reason` of the general rule."""
    return devices.hopper_refusal() if devices.backend() != "gpu" else _passed_over_by_channel(v)


def _passed_over_by_channel(v):
    """Why `impl=None` does not take the kernels for a decay per key channel, or None."""
    batch, time, heads, _ = v.shape
    if time < LONG:
        return f"v has {time} tokens; with a decay per key channel the kernels are timed from {LONG} on"
    if batch * heads < channels.FEWEST:
        return f"batch x heads is {batch * heads}; from {channels.FEWEST} on they fill the GPU"
    return partition.passed_over_reason(v)


def delta_rule(
    q,
    k,
    v,
    beta,
    log_decay,
    scale,
    normalize_qk,
    initial_state,
    segments,
    settings: Settings | None = None,
):
    """Returns outputs and the final state; the public function has checked the arguments.

    Args:
      settings: layouts that replace the tuned ones, without a decay per key channel.
    """
    rows, _, across, _ = partition.spec_of(v, heads=2)
    if k.shape[2] != v.shape[2] and k.shape[2] % partition.parts(across):
        across = None
    wide, vector = P(rows, None, across, None), P(rows, None, across)
    state = P(rows, across, None, None)
    per_channel = log_decay is not None and log_decay.ndim == 4
    local = functools.partial(_local, scale, normalize_qk, settings or SETTINGS)
    if per_channel:
        local = functools.partial(channels.delta_rule, scale, normalized if normalize_qk else None)
    return partition.over_shards(
        local,
        (q, k, v, beta, log_decay, initial_state, segments),
        (wide, wide, wide, vector, wide if per_channel else vector, state, P(rows, None)),
        (wide, state),
    )


def dplr_delta_rule(q, k, v, a, b, log_decay, scale, initial_state, segments):
    """Returns outputs and the final state of the general rule; the public function has checked the arguments."""
    rows, _, across, _ = partition.spec_of(v, heads=2)
    wide, state = P(rows, None, across, None), P(rows, across, None, None)
    decay = P(*wide[: None if log_decay is None else log_decay.ndim])
    return partition.over_shards(
        functools.partial(channels.dplr_delta_rule, scale),
        (q, k, v, a, b, log_decay, initial_state, segments),
        (wide, wide, wide, wide, wide, decay, state, P(rows, None)),
        (wide, state),
    )


def delta_rule_across(
    q, k, v, beta, log_decay, scale, normalize_qk, initial_state, segments, crossing, cut, settings=None
):
    """Returns the outputs on one of the devices that divide time, and the state after its tokens; None for a decay per channel.

    Args:
      crossing, cut: how states cross the cuts, and what is known of the one before these tokens.
    """
    if log_decay is not None and log_decay.ndim == 4:
        return None
    given = q, k, v, beta, log_decay, initial_state, segments
    return _local(scale, normalize_qk, settings or SETTINGS, *given, cut=cut, crossing=crossing)


def _local(
    scale,
    normalize_qk,
    settings,
    q,
    k,
    v,
    beta,
    log_decay,
    initial_state,
    segments,
    cut=None,
    crossing=None,
):
    """Runs the rule on one device: masks, norms, decays and parts of wide values here, the rest in kernels."""
    batch, time, heads, value_dim = v.shape
    key_dim, chunks = k.shape[-1], -(-time // CHUNK)
    parts = head_parts.value_parts(value_dim)
    length = time_pieces.piece_length(chunks, batch * heads * parts.count, settings.pieces)
    pieces = -(-chunks // length)
    if missing := -time % (ROWS if pieces == 1 else length * CHUNK):  # zeros are no-ops
        arrays = q, k, v, beta, log_decay, segments
        q, k, v, beta, log_decay, segments = jax.tree.map(
            lambda x: jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)), arrays
        )
    q, k, v, beta = (select_real(x, segments) for x in (q, k, v, beta))
    if normalize_qk:
        q, k = (normalized(x) for x in (q, k))
    q, k = (head_parts.padded(x, key_dim + -key_dim % BLOCK) for x in (q, k))
    v = head_parts.split(v, parts)
    if initial_state is None:
        state = jnp.zeros((batch, v.shape[2], parts.width, k.shape[-1]), jnp.float32)
    else:
        state = head_parts.split_state(initial_state.astype(jnp.float32), parts)
        state = head_parts.padded(jnp.swapaxes(state, 2, 3), k.shape[-1])
    vectors = time_pieces.vectors_as_rows(token_vectors(beta, log_decay, segments), pieces)
    q, k, vectors, state = (vary_as(x, v, q, k, beta) for x in (q, k, vectors, state))
    q, k, v = (time_pieces.as_rows(x, pieces) for x in (q, k, vary_as(v, q)))
    o, final = _rule(q, k, v, vectors, state, cut, scale, settings, crossing)
    o = head_parts.join(o.reshape(batch, -1, *o.shape[2:])[:, :time], parts, value_dim)
    return o, head_parts.join_state(jnp.swapaxes(final, 2, 3)[:, :, :key_dim], parts, value_dim)


def token_vectors(beta, log_decay, segments):
    """Returns the numbers per token that the kernels read, (b, h, chunks, kinds, c); see tiles.py."""
    batch, time, _ = beta.shape
    padding = -time % CHUNK

    def chunked(x, mode="constant"):
        """(b, t, h or 1) to (b, h or 1, chunks, c)."""
        x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, padding), (0, 0)), mode=mode)
        return jnp.swapaxes(x, 1, 2).reshape(batch, x.shape[2], -1, CHUNK)

    packed = segments is not None and segments.packed
    if packed:
        segment = jnp.maximum(jax.lax.cummax(segments.numbers, axis=1) - 1, 0)
        segment = chunked(segment[..., None], "edge")
    if log_decay is None:  # sums of zeros are left out: XLA would take half a minute to fold them
        total = jnp.zeros_like(chunked(beta))
        enters = leaves = jnp.ones_like(total)
    else:
        log_decay = jnp.maximum(log_decay.astype(jnp.float32), STRONGEST)
        log_decay = select_real(log_decay, segments)
        if packed:
            log_decay = jnp.where(segments.starts[..., None], 0.0, log_decay)
        total = jnp.cumsum(chunked(log_decay), axis=-1)
        enters, leaves = jnp.exp(total), jnp.exp(jnp.minimum(total[..., -1:] - total, 0.0))
    if not packed:
        rows = [total, chunked(beta), enters, leaves]
    else:
        last = segment[..., -1:]
        before = jnp.pad(last[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)))
        segment = jnp.broadcast_to(segment, total.shape)
        enters, leaves = jnp.where(segment == before, enters, 0.0), jnp.where(segment == last, leaves, 0.0)
        rows = [total, chunked(beta), enters, leaves, segment]
    return jnp.stack(rows, axis=3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _rule(q, k, v, vectors, state, cut, scale, settings, crossing):
    """Outputs and the final state, transposed as `state` is. Except in `state`, rows are pieces of rows, in order.

    Heads are those of v and `state`; q, k and `vectors` may have fewer. `crossing` is None where time is not divided, and then
    `cut` is, too; otherwise `state` is the one before all tokens, and the final state that of this device.
    """
    return _run(q, k, v, vectors, state, cut, scale, settings, crossing, keeping=False)[0]


@mosaic_gpu.lowered_once("scale", "settings", "crossing", "keeping")
def _run(q, k, v, vectors, state, cut, scale, settings, crossing, *, keeping):
    """What `_rule` returns; with `keeping`, also the states that enter pieces, their transitions, and facts about chunks."""
    inverse = forward_kernels.prepare(k, vectors, settings.refinements, settings.workers)
    given = k, v, vectors, inverse, state, settings.states
    if crossing is None:
        entering, passages = time_pieces.entering(*given)
    else:
        entering, passages = over_time.entering(*given, cut, crossing)
    stages = settings.forward_keeping if keeping else settings.forward
    results = forward_kernels.forward(k, v, vectors, inverse, entering, scale, stages, q=q, keeping=keeping)
    made = {"inverse": inverse} | ({"states": results["states"]} if keeping else {})
    return (results["o"], time_pieces.last(results["final"], state)), (entering, passages, made)


def _forward(q, k, v, vectors, state, cut, scale, settings, crossing):
    results, (*kept, made) = _run(
        q, k, v, vectors, state, cut, scale, settings, crossing, keeping=settings.keep
    )
    return results, (q, k, v, vectors, cut, *kept, made)


@mosaic_gpu.lowered_once("scale", "settings", "crossing")
def gradients(scale, settings, crossing, residuals, cotangents):
    """The backward pass, from the inputs and the gradients of outputs and of the final state."""
    # The barrier keeps the compiler from storing what the forward pass computed instead of recomputing it.
    residuals, (do, dfinal) = jax.lax.optimization_barrier((residuals, cotangents))
    q, k, v, vectors, cut, entering, passages, made = residuals
    if "states" not in made:
        walked = forward_kernels.forward(
            k, v, vectors, made["inverse"], entering, scale, settings.states, q=None, keeping=True
        )
        made = made | {"states": walked["states"]}
    # One kernel after the other: the interpreter cannot run two at once.
    made, do = jax.lax.optimization_barrier((made, do))
    given = q, k, do, vectors, made, passages, dfinal, scale, settings.backward
    if crossing is None:
        dleaving = time_pieces.leaving(*given)
    else:
        dleaving = over_time.leaving(*given, cut, crossing)
    chain = backward_kernel.chain(q, k, do, vectors, made, dleaving, scale, settings.backward)
    local = gradient_kernel.chunk_gradients(q, k, v, do, vectors, made, chain, scale, settings.turns)
    dq, dk = (_over_group(local[name], q) for name in ("dq", "dk"))
    dvectors = gradient_kernel.vector_gradients(local["dvectors"], vectors, k.shape[-1])
    dstate = time_pieces.first(chain["dstate"], dfinal)
    if crossing is not None:
        dstate = of_first(dstate)
    return dq, dk, chain["dv"], dvectors, dstate, None


_rule.defvjp(promoting(_forward), promoting(gradients))


def _over_group(gradient, like):
    """Sums (b, t, h, k) over the heads that share a key."""
    batch, time, groups, key_dim = like.shape
    if gradient.shape == like.shape:
        return gradient
    gradient = gradient.reshape(batch, time, groups, -1, key_dim).astype(jnp.float32)
    return gradient.sum(3).astype(like.dtype)


def _probe() -> None:
    """Lowers both passes of a small call."""

    def loss(q, k, v, beta, state):
        o, final = delta_rule(q, k, v, beta, None, 1.0, False, state, None)
        return o.sum().astype(jnp.float32) + final.sum()

    wide = jax.ShapeDtypeStruct((1, 70, 1, 64), jnp.bfloat16)
    beta = jax.ShapeDtypeStruct((1, 70, 1), jnp.float32)
    state = jax.ShapeDtypeStruct((1, 1, 64, 64), jnp.float32)
    jax.jit(jax.grad(loss, (0, 1, 2, 3, 4))).trace(wide, wide, wide, beta, state).lower(
        lowering_platforms=("cuda",)
    )
