"""`selective_scan` on Hopper GPUs, by Pallas's Triton backend.

kernels.py holds both passes of the recurrence alone. The skip and the gate are plain JAX around them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from layers.kernels import devices, pallas_triton, partition
from layers.kernels.mosaic_gpu import MAX_GRID, lowered_once
from layers.kernels.promotion import promoting
from layers.kernels.segments import reset_mask, select_real
from layers.kernels.selective_scan.gpu import kernels
from layers.kernels.selective_scan.gpu.kernels import LANES, PADDING, START
from layers.kernels.shard_map_types import vary_as

WIDEST = 32  # states per channel, which a lane keeps in registers for some steps at once
# Fewest tokens of a row, and rows times channels, for which `impl=None` takes these kernels, whose programs walk whole rows.
SHORTEST, FEWEST = 256, 8192


def unsupported_reason(**call: Any) -> str | None:
    """Why these kernels cannot take a call, or None."""
    return unsupported_call(**call) or pallas_triton.refusal(_probe)


def unsupported_call(x, dt, a, b, c, initial_state, **_: Any) -> str | None:
    """Why kernels whose lanes hold all states of a channel cannot take a call, or None."""
    for name, v in {"x": x, "dt": dt, "a": a, "b": b, "c": c, "initial_state": initial_state}.items():
        if v is not None and v.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} has dtype {v.dtype}; expected float32 or bfloat16"
    if a.shape[1] > WIDEST:
        return f"a has {a.shape[1]} states per channel; expected at most {WIDEST}"
    if x.shape[0] > MAX_GRID:
        return f"x has {x.shape[0]} rows; expected at most {MAX_GRID}"
    channels, groups = x.shape[2], b.shape[2]
    if groups > 1 and (channels // groups) % LANES:
        return f"b has {groups} groups of {channels // groups} channels; expected multiples of {LANES}"
    if any(jax.typeof(v).sharding.spec[1] is not None for v in (x, dt, b, c)):
        return f"x is sharded {jax.typeof(x).sharding.spec}; expected whole rows, time not sharded"
    return None


def passed_over_reason(x, **_: Any) -> str | None:
    """Why `impl=None` does not take these kernels, or None. Short calls and those with few channels are left to XLA."""
    if devices.backend() != "gpu":
        return devices.hopper_refusal()
    if x.shape[1] < SHORTEST:
        return f"x has {x.shape[1]} tokens; the kernels are timed from {SHORTEST} on"
    channels = x.shape[0] * x.shape[2]
    if channels < FEWEST:
        return f"batch x channels is {channels}; from {FEWEST} on they fill the GPU"
    return partition.passed_over_reason(x)


def selective_scan(*arguments: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
    """Returns the outputs and the final state; the public function has checked the arguments."""
    return by_shards(_local, *arguments, **options)


def by_shards(local, x, dt, a, b, c, skip, gate, dt_bias, dt_softplus, initial_state, segments):
    """Runs the recurrence on every device's part, and adds skip and gate.

    Args:
      local: the recurrence on one device, as `_local`.
    """
    batch, _, channels = x.shape
    shape = (batch, channels, a.shape[1])
    state = jnp.zeros(shape, jnp.float32) if initial_state is None else initial_state.astype(jnp.float32)
    rows, _, split = partition.spec_of(x, heads=2)
    if b.shape[2] > 1:
        split = None
    series, groups = P(rows, None, split), P(rows, None, None, None)
    arrays = {
        "x": (x, series),
        "dt": (dt, series),
        "a": (a.astype(jnp.float32), P(split, None)),
        "b": (b, groups),
        "c": (c, groups),
        "state": (state, P(rows, split, None)),
    }
    if dt_bias is not None:
        arrays["bias"] = dt_bias.astype(jnp.float32), P(split)
    if segments is not None:
        arrays["flags"] = _flags(segments), P(rows, None)

    def run(*given):
        leaves = jax.tree.leaves(given)
        arguments = dict(zip(arrays, (vary_as(v, *leaves) for v in given), strict=True))
        return local(dt_softplus, **arguments)

    y, final = partition.over_shards(run, *zip(*arrays.values(), strict=True), (series, P(rows, split, None)))
    if skip is not None:
        y = y + skip.astype(jnp.float32)[None, None] * x.astype(jnp.float32)
    if gate is not None:
        y = y * jax.nn.silu(gate.astype(jnp.float32))
    return select_real(y, segments), final


def _flags(segments):
    """START where the state is reset, PADDING where it stays, (b, t), int32."""
    start = jnp.zeros(segments.real.shape, bool) if (resets := reset_mask(segments)) is None else resets
    return jnp.where(segments.real, jnp.where(start, START, 0), PADDING).astype(jnp.int32)


def _local(softplus, x, dt, a, b, c, state, bias=None, flags=None):
    """On one device; states have the axes (b, n, d) in kernels, so that neighbouring lanes have neighbouring channels."""
    y, final = _scan(x, dt, a.T, b, c, bias, flags, state.swapaxes(1, 2), softplus)
    return y, final.swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(8,))
def _scan(x, dt, a, b, c, bias, flags, state, softplus):
    y, final, _ = forward(x, dt, a, b, c, bias, flags, state, softplus, keeping=False)
    return y, final


@lowered_once("softplus", "keeping")
def forward(x, dt, a, b, c, bias, flags, state, softplus, *, keeping):
    """Returns the outputs, the last state, and the states before every few steps if `keeping`."""
    return kernels.forward(x, dt, a, b, c, bias, flags, state, softplus=softplus, keeping=keeping)


def _forward(x, dt, a, b, c, bias, flags, state, softplus):
    y, final, borders = forward(x, dt, a, b, c, bias, flags, state, softplus, keeping=True)
    return (y, final), (x, dt, a, b, c, bias, flags, borders)


@lowered_once("softplus")
def gradients(softplus, residuals, cotangents):
    """The backward pass, from the states that `forward` keeps."""
    x, dt, a, b, c, bias, flags, borders = residuals
    found = kernels.backward(x, dt, a, b, c, bias, flags, borders, *cotangents, softplus=softplus)
    db, dc = (_of_groups(v, like) for v, like in ((found["db"], b), (found["dc"], c)))
    dbias = None if bias is None else found["dbias"].sum(0)
    return found["dx"], found["ddt"], found["da"].sum(0), db, dc, dbias, None, found["dstate"]


def _of_groups(partial, like):
    """The gradient of b or c (b, t, g, n), from one per program, (b, programs, t, n)."""
    batch, time, groups, states = like.shape
    return partial.reshape(batch, groups, -1, time, states).sum(2).swapaxes(1, 2).astype(like.dtype)


_scan.defvjp(promoting(_forward), promoting(gradients))


def _probe() -> None:
    """Lowers both passes of a small call."""

    def loss(x, a, b):
        y, final, *_ = _local(True, x, x, a, b, b, jnp.zeros((1, LANES, 16)))
        return y.sum() + final.sum()

    x, a, b = (
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 16, LANES), (LANES, 16), (1, 16, 1, 16))
    )
    with jax.sharding.use_abstract_mesh(pallas_triton.hopper_mesh()):
        jax.jit(jax.grad(loss, (0, 1, 2))).trace(x, a, b).lower(lowering_platforms=("cuda",))
