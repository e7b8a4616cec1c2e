"""The delta rules on Hopper GPUs with a decay per key channel: both passes on one device.

channel_kernels.py has the equations of a chunk. Gradients of q, e, w, k and of the decay are those of scores and of products with
states, each as `gated_linear_attention` computes them (its channel_gradients.py):

    dP = scale do z^T,    dN = -dx z^T,    dM = dx v^T,    dQ = scale do v^T,

with Q the scores of q and k.
"""

import functools

import jax
import jax.numpy as jnp

from layers.kernels import mosaic_gpu, pallas_triton
from layers.kernels.delta_rule.gpu import channel_kernels
from layers.kernels.gated_linear_attention.gpu import channel_gradients, channel_tiles
from layers.kernels.gated_linear_attention.gpu import channel_kernels as linear_kernels
from layers.kernels.gated_linear_attention.gpu.channel_tiles import PART
from layers.kernels.gated_linear_attention.gpu.channels import summed
from layers.kernels.promotion import promoting
from layers.kernels.segments import select_real
from layers.kernels.shard_map_types import vary_alike


def delta_rule(scale, normalized, q, k, v, beta, log_decay, state, segments):
    """Runs `delta_rule` on one device; `normalized` divides queries and keys by their norms, or is None."""
    q, k, v, beta = (select_real(x, segments) for x in (q, k, v, beta))
    if normalized is not None:
        q, k = normalized(q), normalized(k)
    w = beta[..., None].astype(jnp.float32) * jnp.repeat(k, v.shape[2] // k.shape[2], axis=2)
    return _local(scale, q, k, w.astype(k.dtype), None, v, log_decay, state, segments)


def dplr_delta_rule(scale, q, k, v, a, b, log_decay, state, segments):
    """Runs `dplr_delta_rule` on one device."""
    q, k, v, a, b = (select_real(x, segments) for x in (q, k, v, a, b))
    return _local(scale, q, -a, b, k, v, log_decay, state, segments)


def _local(scale, q, e, w, k, v, log_decay, state, segments):
    shape = (*v.shape[:3], q.shape[3])
    if log_decay is None:
        log_decay = jnp.zeros(shape[:3], jnp.float32)
    if log_decay.ndim == 3:
        log_decay = jnp.broadcast_to(log_decay[..., None], shape)
    g = select_real(log_decay.astype(jnp.float32), segments)
    if state is None:
        state = jnp.zeros((shape[0], *shape[2:], v.shape[3]), jnp.float32)
    number = segments.numbers if segments is not None and segments.packed else None
    return rule(*vary_alike((q, e, w, k, v, g, number, state.astype(jnp.float32))), scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(8,))
def rule(q, e, w, k, v, g, number, state, scale):
    """Outputs (b, t, h, v), in the type of v, and the final state (b, h, k, v), float32.

    Args:
      q, e: (b, t, heads, k), bfloat16, with which outputs are read from the state and what is erased from it.
      w: (b, t, h, k), bfloat16, along which that is written back.
      k: (b, t, h, k), bfloat16, along which values are written; None for `delta_rule`, which writes them along w.
      v: (b, t, h, v), bfloat16.
      g: (b, t, h, k), log-decay, float32.
      number: (b, t), the segment number per step, or None.
      state: (b, h, k, v), float32.
    """
    return forward(q, e, w, k, v, g, number, state, scale)[0]


@mosaic_gpu.lowered_once("scale")
def forward(q, e, w, k, v, g, number, state, scale):
    """Returns the results, and what the backward pass needs of them: sums, inverses, scores, z and states."""
    general = k is not None
    numbers, sums = channel_tiles.numbers(number), channel_tiles.sums(g)
    inverse = channel_kernels.inverses(e, w, sums, numbers, general)
    weights = linear_kernels.scores(q, w, sums, None, numbers, scale)
    x, crossing, read = v, None, None
    if general:
        crossing = linear_kernels.scores(e, k, sums, None, numbers, -1.0, early=True, strict=True)
        read = linear_kernels.scores(q, k, sums, None, numbers, scale)
        x = linear_kernels.outputs(None, v, sums, numbers, crossing, None, 1.0)
    written = (k, v) if general else None
    states, z, final = channel_kernels.walk(e, w, x, sums, inverse, numbers, state, written)
    others = (read, v) if general else None
    o = linear_kernels.outputs(q, z, sums, numbers, weights, states, scale, others=others)
    return (o, final), (sums, inverse, weights, crossing, read, z, states)


def _forward(q, e, w, k, v, g, number, state, scale):
    results, kept = forward(q, e, w, k, v, g, number, state, scale)
    return results, (q, e, w, k, v, number, *kept)


@mosaic_gpu.lowered_once("scale")
def gradients(scale, residuals, cotangents):
    """The backward pass, from what `forward` keeps and the gradients of outputs and the final state."""
    q, e, w, k, v, number, sums, inverse, weights, crossing, read, z, states = residuals
    do, dfinal = cotangents
    heads, general = sums.shape[2], k is not None
    numbers = channel_tiles.numbers(number)
    dstates, dx, dstate = channel_kernels.walk_back(
        q, e, w, do, sums, inverse, weights, numbers, dfinal, scale, general
    )

    def pairs(rows, columns, of_rows, of_columns, states, dstates, factor, **kinds):
        """The gradients of the scores of two arrays, and of what they read from states and write to them."""
        dscores = channel_gradients.score_gradients(of_rows, of_columns, heads, numbers, factor)
        return channel_gradients.gradients(
            rows, columns, of_columns, of_rows, sums, None, numbers, dscores, states, dstates, factor, **kinds
        )

    erasing = {"early": general, "strict": True}
    found = [
        pairs(q, w, do, z, states, dstates, scale),
        pairs(e, w, dx, z, states, None, -1.0, **erasing),
    ]
    dv, dk = dx, None
    if general:
        found += [pairs(q, k, do, v, None, dstates, scale), pairs(e, k, dx, v, None, None, -1.0, **erasing)]
        dk = _sum(found[2]["dk"], found[3]["dk"])
        others = crossing, dx
        dv = linear_kernels.outputs(k, do, sums, numbers, read, dstates, others=others)
    dq, de = (_sum(*(x["dq"] for x in found[i::2])) for i in (0, 1))
    dg = functools.reduce(jnp.add, (x["dg"] for x in found))
    dw = _sum(found[0]["dk"], found[1]["dk"])
    return summed(dq, q.shape[2]), summed(de, e.shape[2]), dw, dk, dv, dg, None, dstate


rule.defvjp(promoting(_forward), promoting(gradients))


def _sum(first, *others):
    """The sum of arrays in float32, in their type."""
    if not others:
        return first
    return functools.reduce(
        jnp.add, (x.astype(jnp.float32) for x in others), first.astype(jnp.float32)
    ).astype(first.dtype)


def probe() -> None:
    """Lowers both passes of small calls of both rules."""

    def loss(q, e, w, k, v, g, number, state):
        o, final = rule(q, e, w, k, v, g, number, state, 1.0)
        return o.sum() + final.sum()

    wide = jax.ShapeDtypeStruct((1, 16, 1, PART), jnp.bfloat16)
    number = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    g = jax.ShapeDtypeStruct((1, 16, 1, PART), jnp.float32)
    state = jax.ShapeDtypeStruct((1, 1, PART, PART), jnp.float32)
    with jax.sharding.use_abstract_mesh(pallas_triton.hopper_mesh()):
        for k in (None, wide):
            traced = jax.jit(jax.grad(loss, (0, 1, 2, 4, 5, 7))).trace(
                wide, wide, wide, k, wide, g, number, state
            )
            traced.lower(lowering_platforms=("cuda",))
