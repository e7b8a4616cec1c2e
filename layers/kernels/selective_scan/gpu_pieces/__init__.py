"""`selective_scan` on Hopper GPUs in pieces of time, which fill the GPU where rows and channels do not.

kernels.py and backward.py hold both passes of the recurrence alone, by Pallas's Triton backend. What surrounds them is that of `gpu`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from layers.kernels import pallas_triton
from layers.kernels.mosaic_gpu import lowered_once
from layers.kernels.promotion import promoting
from layers.kernels.selective_scan import gpu
from layers.kernels.selective_scan.gpu.kernels import SPAN
from layers.kernels.selective_scan.gpu_pieces import backward as backward_kernels
from layers.kernels.selective_scan.gpu_pieces import kernels
from layers.kernels.triton_ptx import LANES

# Programs to fill the GPU with, and the fewest steps of a piece of time. Three pieces of 384 programs were timed.
FORWARD_PROGRAMS, BACKWARD_PROGRAMS, SHORTEST_PIECE = 1152, 1152, 128


def unsupported_reason(**call: Any) -> str | None:
    """Why these kernels cannot take a call, or None."""
    return gpu.unsupported_call(**call) or pallas_triton.refusal(_probe)


def selective_scan(*arguments: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
    """Returns the outputs and the final state; the public function has checked the arguments."""
    return gpu.by_shards(_local, *arguments, **options)


def _local(softplus, x, dt, a, b, c, state, bias=None, flags=None):
    """On one device; states have the axes (b, n, d) in kernels, so that neighbouring lanes have neighbouring channels."""
    series = kernels.Series(x, dt, kernels.packed(b, c), bias, flags)
    y, final = _scan(series, a.T, state.swapaxes(1, 2), softplus)
    return y, final.swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scan(series, a, state, softplus):
    y, final, _ = forward(series, a, state, softplus, keeping=False)
    return y, final


@lowered_once("softplus", "keeping")
def forward(series, a, state, softplus, *, keeping):
    """Returns the outputs, the last state, and the states before every few steps if `keeping`."""
    length = piece_length(*series.x.shape, FORWARD_PROGRAMS)
    return kernels.forward(series, a, state, softplus=softplus, length=length, keeping=keeping)


def piece_length(batch: int, time: int, channels: int, programs: int) -> int:
    """Steps per piece of the time axis: as many pieces as make `programs`, none shorter than `SHORTEST_PIECE`."""
    pieces = -(-programs // (batch * -(-channels // LANES)))
    pieces = max(1, min(pieces, time // SHORTEST_PIECE))
    return SPAN * -(-time // (SPAN * pieces))


def _forward(series, a, state, softplus):
    y, final, borders = forward(series, a, state, softplus, keeping=True)
    return (y, final), (series, a, borders)


@lowered_once("softplus")
def gradients(softplus, residuals, cotangents):
    """The backward pass, from the states that `forward` keeps."""
    series, a, borders = residuals
    length = piece_length(*series.x.shape, BACKWARD_PROGRAMS)
    found = backward_kernels.backward(series, a, borders, *cotangents, softplus=softplus, length=length)
    groups, partial = series.vectors.shape[2], found["dvectors"]
    batch, _, time, lanes = partial.shape
    dvectors = partial.reshape(batch, groups, -1, time, lanes).sum(2).swapaxes(1, 2)
    dbias = None if series.bias is None else found["dbias"].sum((0, 1))
    dseries = kernels.Series(found["dx"], found["ddt"], dvectors, dbias, None)
    return dseries, found["da"].sum((0, 1)), found["dstate"]


_scan.defvjp(promoting(_forward), promoting(gradients))


def _probe() -> None:
    """Lowers both passes of a small call, in two pieces."""

    def loss(x, a, b):
        y, final, *_ = _local(True, x, x, a, b, b, jnp.zeros((1, LANES, 16)))
        return y.sum() + final.sum()

    x, a, b = (
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((1, 2 * SHORTEST_PIECE, LANES), (LANES, 16), (1, 2 * SHORTEST_PIECE, 1, 16))
    )
    with jax.sharding.use_abstract_mesh(pallas_triton.hopper_mesh()):
        jax.jit(jax.grad(loss, (0, 1, 2))).trace(x, a, b).lower(lowering_platforms=("cuda",))
