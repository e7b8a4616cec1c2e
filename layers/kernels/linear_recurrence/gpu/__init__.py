"""`linear_recurrence` on Hopper GPUs: one pass over memory forward, one backward; see kernels.py for the kernels."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from layers.kernels import devices, mosaic_gpu, partition
from layers.kernels.checks import accumulation_dtype
from layers.kernels.linear_recurrence.gpu import folded, kernels
from layers.kernels.linear_recurrence.gpu.kernels import Planes, Settings
from layers.kernels.promotion import promoting
from layers.kernels.segments import Segments, reset_mask
from layers.kernels.shard_map_types import vary_as

# Within 3% of the best candidates of `python -m experiments.benchmark tune`, in float32.
FORWARD = Settings()
BACKWARD = Settings(stages=3)

SHORTEST, SHORTEST_COMPLEX = 64, 704
TYPES = (jnp.float32, jnp.bfloat16, jnp.complex64)


def unsupported_reason(a, x, initial_state, **_: Any) -> str | None:
    """Why these kernels cannot take a call, or None."""
    for name, array in {"a": a, "x": x, "initial_state": initial_state}.items():
        if array is not None and array.dtype not in TYPES:
            return f"{name} has dtype {array.dtype}; expected float32, bfloat16 or complex64"
    if jax.typeof(x).sharding.spec[1] is not None:
        return f"x is sharded {jax.typeof(x).sharding.spec}; expected whole rows, time not sharded"
    if x.shape[0] > mosaic_gpu.MAX_GRID:
        return f"x has {x.shape[0]} rows; expected at most {mosaic_gpu.MAX_GRID}"
    return mosaic_gpu.refusal(_probe)


def passed_over_reason(a, x, initial_state, **_: Any) -> str | None:
    """Why `impl=None` does not take these kernels, or None.

    Short calls are left to XLA, which fuses them with their neighbours. Complex arrays pay off where they are made of their
    parts; on arrays that are in memory as complex numbers XLA is faster.
    """
    is_complex = any(v is not None and jnp.iscomplexobj(v) for v in (a, x, initial_state))
    shortest = SHORTEST_COMPLEX if is_complex else SHORTEST
    if devices.backend() != "gpu":
        return devices.hopper_refusal()
    if x.shape[1] < shortest:
        return f"x has {x.shape[1]} steps; from {shortest} on the kernel is faster than XLA"
    if is_complex and a.shape[1] > 1:
        return "a is complex and varies in time, for which XLA is faster"
    return partition.passed_over_reason(x)


@dataclasses.dataclass(frozen=True)
class Call:
    """The static part of a call."""

    reverse: bool
    x_dtype: Any
    forward: Settings
    backward: Settings


def linear_recurrence(
    a,
    x,
    initial_state,
    segments,
    reverse,
    forward: Settings | None = None,
    backward: Settings | None = None,
):
    """Returns every state and the last; the public function has checked the arguments.

    Args:
      forward, backward: layouts of the kernels that replace the tuned ones.
    """
    dtype = accumulation_dtype(a, x, initial_state)
    shape = (x.shape[0], x.shape[2])
    state = jnp.zeros(shape, dtype) if initial_state is None else initial_state.astype(dtype)
    call = Call(reverse, x.dtype, forward or FORWARD, backward or BACKWARD)
    batch, _, channels = partition.spec_of(x, heads=2)
    whole, edge = P(batch, None, channels), P(batch, channels)
    a_spec = P(batch if a.shape[0] > 1 else None, None, channels)
    arrays = a, x, state, token_codes(segments, reverse)

    def run(a, x, state, codes):
        return _recurrence(vary_as(a, x), x, vary_as(state, x), codes, call)

    return partition.over_shards(run, arrays, (a_spec, whole, edge, P(batch, None)), (whole, edge))


def token_codes(segments: Segments | None, reverse: bool) -> jax.Array | None:
    """Returns what each token does to the state, (b, t); None if there are no segments."""
    if segments is None:
        return None
    starts, codes = reset_mask(segments, reverse), kernels.KEPT
    if starts is not None:
        codes = jnp.where(starts, kernels.RESET, kernels.KEPT)
    return jnp.where(segments.real, codes, kernels.SKIPPED).astype(jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _recurrence(a, x, state, codes, call):
    """Outputs in the type of x (complex if a is), and the final state in the type of `state`."""
    return _run(a, x, state, codes, call)


@mosaic_gpu.lowered_once("call")
def _run(a, x, state, codes, call):
    channels = x.shape[-1]
    dtype = jnp.float32 if jnp.iscomplexobj(state) else x.dtype
    h, final = _kernels(x.shape, state.dtype, call.forward).forward(
        _planes(a), _planes(x), codes, _planes(state), call.reverse, dtype, call.forward
    )
    return _join(h, channels), _join(final, channels)


def _forward(a, x, state, codes, call):
    h, final = _recurrence(a, x, state, codes, call)
    return (h, final), (a, state, codes, h)


@mosaic_gpu.lowered_once("call")
def gradients(call, residuals, cotangents):
    """The backward pass, from (a, state, codes, h) and the gradients of h and the final state."""
    a, state, codes, h = residuals
    dh, dfinal = cotangents
    channels = h.shape[-1]
    is_complex = jnp.issubdtype(call.x_dtype, jnp.complexfloating)
    da, dx, dstate = _kernels(h.shape, state.dtype, call.backward).backward(
        _planes(a),
        _planes(h),
        _planes(dh),
        codes,
        _planes(state),
        _planes(dfinal),
        call.reverse,
        (2, jnp.float32) if is_complex else (1, call.x_dtype),
        call.backward,
    )
    da = _join(da, channels)
    da = da.sum([axis for axis in (0, 1) if a.shape[axis] < da.shape[axis]], keepdims=True)
    return da.astype(a.dtype), _join(dx, channels), _join(dstate, channels), None


_recurrence.defvjp(promoting(_forward), promoting(gradients))


def _kernels(shape: tuple[int, ...], dtype: Any, settings: Settings) -> Any:
    """The module that runs a pass over arrays of this shape with a state of this type."""
    fold = jnp.issubdtype(dtype, jnp.complexfloating) if settings.fold is None else settings.fold
    return folded if fold and _narrow(shape) else kernels


def _narrow(shape: tuple[int, ...]) -> bool:
    return folded.narrow((*shape[:2], _padded(shape[2])))


def _padded(channels: int) -> int:
    return -(-channels // 8) * 8


def _planes(v: jax.Array) -> Planes:
    """Real and imaginary part, or v itself; channels are padded so that rows are multiples of 16 bytes, as copies need."""
    parts = (v.real, v.imag) if jnp.iscomplexobj(v) else (v,)
    missing = _padded(v.shape[-1]) - v.shape[-1]
    return tuple(jnp.pad(p, [(0, 0)] * (v.ndim - 1) + [(0, missing)]) for p in parts) if missing else parts


def _join(planes: Planes, channels: int) -> jax.Array:
    """The array whose parts these are, without padding."""
    planes = tuple(p[..., :channels] for p in planes)
    return planes[0] if len(planes) == 1 else jax.lax.complex(*planes)


def _probe() -> None:
    """Lowers both passes of a small call."""

    def loss(a, x, state):
        h, final = linear_recurrence(a, x, state, None, False)
        return h.sum() + final.sum()

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 16, 128), (1, 16, 128), (1, 128))]
    jax.jit(jax.grad(loss, (0, 1, 2))).trace(*shapes).lower(lowering_platforms=("cuda",))
