"""`gated_linear_attention` on Hopper GPUs with a decay per key channel: both passes on one device.

channel_levels.py says how decays enter products. channel_kernels.py, channel_walk.py and channel_gradients.py hold the kernels.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels import mosaic_gpu
from layers.kernels.gated_linear_attention.gpu import channel_gradients, channel_kernels, channel_walk
from layers.kernels.gated_linear_attention.gpu.channel_kernels import Settings
from layers.kernels.gated_linear_attention.gpu.channel_levels import vectors
from layers.kernels.gated_linear_attention.gpu.kernels import CHUNK, PART
from layers.kernels.promotion import promoting

SETTINGS = Settings()
WIDEST_VALUES = 256  # value features per head


class Call(NamedTuple):
    """The static part of a call."""

    scale: float
    settings: Settings


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def attend(q, k, v, g, number, state, call):
    """Outputs (b, t, h, v), in the type of v, and the final state (b, h, k, v), float32.

    Args:
      q, k, v: (b, t, heads, width), bfloat16, t a multiple of 8, widths of 64.
      g: (b, t, h, k), log-decay, float32.
      number: (b, t), the segment number per step, or None.
      state: (b, h, k, v), float32.
    """
    walked, _ = forward(q, k, v, g, number, state, call, keeping=False)
    return walked["out"], walked["final"]


@mosaic_gpu.lowered_once("call", "keeping")
def forward(q, k, v, g, number, state, call, *, keeping):
    """Returns what `channel_walk.walk` and `channel_kernels.prepare` return."""
    numbers = vectors(number, -(-q.shape[1] // CHUNK))
    prepared = channel_kernels.prepare(q, k, g, numbers, call.scale, call.settings)
    # The interpreter cannot start a kernel while another runs, here and below.
    prepared, v, state = jax.lax.optimization_barrier((prepared, v, state))
    walked = channel_walk.walk(**prepared, x=v, state=state, settings=call.settings, keeping=keeping)
    return walked, prepared


def _forward(q, k, v, g, number, state, call):
    walked, prepared = forward(q, k, v, g, number, state, call, keeping=True)
    return (walked["out"], walked["final"]), (q, k, v, g, number, walked["states"], prepared)


@mosaic_gpu.lowered_once("call")
def gradients(call, residuals, cotangents):
    """The backward pass, from what `forward` keeps and the gradients of outputs and the final state."""
    q, k, v, g, number, states, prepared = residuals
    do, dfinal = cotangents
    do, dfinal, states = jax.lax.optimization_barrier((do, dfinal, states))
    backwards = prepared | {"reading": prepared["writing"], "writing": prepared["reading"]}
    walked = channel_walk.walk(
        **backwards, x=do, state=dfinal, settings=call.settings, reverse=True, keeping=True
    )
    walked, q, k, v, g = jax.lax.optimization_barrier((walked, q, k, v, g))
    numbers = vectors(number, prepared["keep"].shape[2])
    of_chunks = channel_gradients.gradients(
        q, k, v, do, g, numbers, prepared["keep"], states, walked["states"], call.scale
    )
    dq, dk, dv = (
        summed(dx, x.shape[2]) for dx, x in ((of_chunks["dq"], q), (of_chunks["dk"], k), (walked["out"], v))
    )
    return dq, dk, dv, of_chunks["dg"], None, walked["final"]


attend.defvjp(promoting(_forward), promoting(gradients))


def summed(dx: jax.Array, heads: int) -> jax.Array:
    """The gradient of an array with `heads` shared heads, from one gradient per head, (b, t, h, width)."""
    if dx.shape[2] == heads:
        return dx
    batch, time, count, width = dx.shape
    dx = dx.reshape(batch, time, heads, count // heads, width)
    return dx.sum(3, dtype=jnp.float32).astype(dx.dtype)


def probe() -> None:
    """Lowers both passes of a small call."""

    def loss(q, k, v, g, number, state):
        o, final = attend(q, k, v, g, number, state, Call(1.0, SETTINGS))
        return o.sum() + final.sum()

    heads = jax.ShapeDtypeStruct((1, 16, 1, PART), jnp.bfloat16)
    number = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    g = jax.ShapeDtypeStruct((1, 16, 1, PART), jnp.float32)
    state = jax.ShapeDtypeStruct((1, 1, PART, PART), jnp.float32)
    traced = jax.jit(jax.grad(loss, (0, 1, 2, 3, 5))).trace(heads, heads, heads, g, number, state)
    traced.lower(lowering_platforms=("cuda",))
