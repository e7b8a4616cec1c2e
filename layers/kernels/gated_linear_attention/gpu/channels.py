"""`gated_linear_attention` on Hopper GPUs with a decay per key channel: both passes on one device.

channel_tiles.py says how decays enter products. channel_kernels.py and channel_gradients.py hold the kernels.
"""

import functools

import jax
import jax.numpy as jnp

from layers.kernels import mosaic_gpu, pallas_triton
from layers.kernels.gated_linear_attention.gpu import channel_gradients, channel_kernels, channel_tiles
from layers.kernels.gated_linear_attention.gpu.channel_tiles import PART
from layers.kernels.promotion import promoting

WIDEST = 512  # key or value features per head
FEWEST = 32  # smallest batch x heads for which `impl=None` takes these kernels


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def attend(q, k, v, g, bonus, number, state, scale):
    """Outputs (b, t, h, v), in the type of v, and the final state (b, h, k, v), float32.

    Args:
      q, k, v: (b, t, heads, width), bfloat16.
      g: (b, t, h, k), log-decay, float32.
      bonus: (h, k), float32, or None.
      number: (b, t), the segment number per step, or None.
      state: (b, h, k, v), float32.
    """
    return forward(q, k, v, g, bonus, number, state, scale)[0]


@mosaic_gpu.lowered_once("scale")
def forward(q, k, v, g, bonus, number, state, scale):
    """Returns the results, and what the backward pass needs of them: sums, scores and states."""
    numbers, sums = channel_tiles.numbers(number), channel_tiles.sums(g)
    weights = channel_kernels.scores(q, k, sums, bonus, numbers, scale)
    states, final = channel_kernels.walk(k, v, sums, numbers, state)
    o = channel_kernels.outputs(q, v, sums, numbers, weights, states, scale, bonus is not None)
    return (o, final), (sums, weights, states)


def _forward(q, k, v, g, bonus, number, state, scale):
    results, kept = forward(q, k, v, g, bonus, number, state, scale)
    return results, (q, k, v, bonus, number, *kept)


@mosaic_gpu.lowered_once("scale")
def gradients(scale, residuals, cotangents):
    """The backward pass, from what `forward` keeps and the gradients of outputs and the final state."""
    q, k, v, bonus, number, sums, weights, states = residuals
    do, dfinal = cotangents
    numbers = channel_tiles.numbers(number)
    dstates, dstate = channel_kernels.walk(q, do, sums, numbers, dfinal, scale, bonus is not None)
    dv = channel_kernels.outputs(k, do, sums, numbers, weights, dstates)
    dscores = channel_gradients.score_gradients(do, v, sums.shape[2], numbers, scale)
    found = channel_gradients.gradients(q, k, v, do, sums, bonus, numbers, dscores, states, dstates, scale)
    dq, dk, dv = (summed(dx, x.shape[2]) for dx, x in ((found["dq"], q), (found["dk"], k), (dv, v)))
    dbonus = None if bonus is None else found["dbonus"].sum((0, 1))
    return dq, dk, dv, found["dg"], dbonus, None, dstate


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
        o, final = attend(q, k, v, g, None, number, state, 1.0)
        return o.sum() + final.sum()

    heads = jax.ShapeDtypeStruct((1, 16, 1, PART), jnp.bfloat16)
    number = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    g = jax.ShapeDtypeStruct((1, 16, 1, PART), jnp.float32)
    state = jax.ShapeDtypeStruct((1, 1, PART, PART), jnp.float32)
    with jax.sharding.use_abstract_mesh(pallas_triton.hopper_mesh()):
        traced = jax.jit(jax.grad(loss, (0, 1, 2, 3, 5))).trace(heads, heads, heads, g, number, state)
        traced.lower(lowering_platforms=("cuda",))
