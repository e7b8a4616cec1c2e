"""`short_conv` on Hopper GPUs: one pass over memory forward, one backward; see kernels.py for the kernels."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from layers.kernels import devices, mosaic_gpu, partition
from layers.kernels.promotion import promoting
from layers.kernels.shard_map_types import vary_as
from layers.kernels.short_conv.edges import final_state, token_codes
from layers.kernels.short_conv.gpu import kernels
from layers.kernels.short_conv.gpu.tiles import Settings

# Within 2% of the best candidates of `python -m experiments.benchmark tune` in both types.
FORWARD = Settings()
BACKWARD = Settings(steps=32)

SHORTEST = 64
TYPES = (jnp.float32, jnp.bfloat16)


def unsupported_reason(x, weight, bias, initial_state, segments, **_: Any) -> str | None:
    """Why these kernels cannot take a call, or None."""
    arrays = {"x": x, "weight": weight, "bias": bias, "initial_state": initial_state}
    for name, array in arrays.items():
        if array is not None and array.dtype not in TYPES:
            return f"{name} has dtype {array.dtype}; expected float32 or bfloat16"
    if segments is not None and segments.padding != "end":
        return "padding may stand anywhere; expected segment_ids as Segments.of(ids, padding='end')"
    if jax.typeof(x).sharding.spec[1] is not None:
        return f"x is sharded {jax.typeof(x).sharding.spec}; expected whole rows, time not sharded"
    if x.shape[0] > mosaic_gpu.MAX_GRID:
        return f"x has {x.shape[0]} rows; expected at most {mosaic_gpu.MAX_GRID}"
    return mosaic_gpu.refusal(_probe)


def passed_over_reason(x, **_: Any) -> str | None:
    """Why `impl=None` does not take these kernels, or None.

    Short calls are left to XLA, which fuses them with their neighbours, and so are channels that the kernels would copy to
    rows of a multiple of 16 bytes.
    """
    if devices.backend() != "gpu":
        return devices.hopper_refusal()
    if x.shape[1] < SHORTEST:
        return f"x has {x.shape[1]} steps; from {SHORTEST} on the kernel is faster than XLA"
    if _missing(x):
        return f"x has {x.shape[2]} channels; without a copy the kernel takes multiples of {_multiple(x)}"
    return partition.passed_over_reason(x)


@dataclasses.dataclass(frozen=True)
class Call:
    """The static part of a call."""

    silu: bool
    forward: Settings
    backward: Settings


def short_conv(
    x,
    weight,
    bias,
    activation,
    initial_state,
    segments,
    forward: Settings | None = None,
    backward: Settings | None = None,
):
    """Returns outputs and the final state; the public function has checked the arguments.

    Args:
      forward, backward: layouts of the kernels that replace the tuned ones.
    """
    call = Call(activation == "silu", forward or FORWARD, backward or BACKWARD)
    batch, _, channels = partition.spec_of(x, heads=2)
    whole, edge = P(batch, None, channels), P(batch, None, channels)
    arrays = x, weight, bias, initial_state, segments
    specs = whole, P(None, channels), P(channels), edge, P(batch, None)

    def run(x, weight, bias, state, segments):
        weight, bias, state = jax.tree.map(lambda v: vary_as(v, x), (weight, bias, state))
        final = final_state(x, state, segments, weight.shape[0] - 1)
        codes = token_codes(segments, weight.shape[0] - 1)
        missing = _missing(x)
        padded = jax.tree.map(
            lambda v: jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, missing)]) if missing else v,
            (x, weight, bias, state),
        )
        return _convolution(*padded, codes, call)[..., : x.shape[2]], final

    return partition.over_shards(run, arrays, specs, (whole, edge))


def _multiple(x: jax.Array) -> int:
    """The number of channels in 16 bytes, of which rows are multiples, as copies need."""
    return 16 // x.dtype.itemsize


def _missing(x: jax.Array) -> int:
    return -x.shape[2] % _multiple(x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _convolution(x, weight, bias, state, codes, call):
    """The outputs, in the type of x."""
    return _run(x, weight, bias, state, codes, call)


@mosaic_gpu.lowered_once("call")
def _run(x, weight, bias, state, codes, call):
    return kernels.forward(x, weight, bias, state, codes, call.silu, call.forward)


def _forward(x, weight, bias, state, codes, call):
    return _convolution(x, weight, bias, state, codes, call), (x, weight, bias, state, codes)


@mosaic_gpu.lowered_once("call")
def gradients(call, residuals, dy):
    """The backward pass, from (x, weight, bias, state, codes) and the gradient of y."""
    x, weight, bias, state, codes = residuals
    dx, dweight, dbias, dstate = kernels.backward(x, dy, weight, bias, state, codes, call.silu, call.backward)
    return (
        dx,
        dweight.astype(weight.dtype),
        None if bias is None else dbias.astype(bias.dtype),
        None if state is None else dstate.astype(state.dtype),
        None,
    )


_convolution.defvjp(promoting(_forward), promoting(gradients))


def _probe() -> None:
    """Lowers both passes of a small call."""

    def loss(x, weight, bias, state):
        return short_conv(x, weight, bias, "silu", state, None)[0].sum()

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 16, 128), (4, 128), (128,), (1, 3, 128))]
    jax.jit(jax.grad(loss, (0, 1, 2, 3))).trace(*shapes).lower(lowering_platforms=("cuda",))
