"""The delta rules on Hopper GPUs with a decay per key channel: both passes on one device.

channel_kernels.py has the equations of a chunk, channel_scores.py the kernel that comes first, and channel_gradients.py the gradients.
`dplr_delta_rule` treats the columns w and k alike, one after the other.
"""

import functools

import jax
import jax.numpy as jnp

from layers.kernels import mosaic_gpu, pallas_triton
from layers.kernels.delta_rule.gpu import channel_gradients, channel_kernels, channel_scores
from layers.kernels.gated_linear_attention.gpu import channel_tiles
from layers.kernels.gated_linear_attention.gpu.channel_tiles import PART
from layers.kernels.gated_linear_attention.gpu.channels import summed
from layers.kernels.promotion import promoting
from layers.kernels.segments import select_real
from layers.kernels.shard_map_types import vary_alike

FEWEST = 32  # smallest batch x heads for which `impl=None` takes these kernels


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
    """Returns the results, and what the backward pass needs of them: sums, prepared arrays, z and states."""
    numbers, sums = channel_tiles.numbers(number), channel_tiles.sums(g)
    general = k is not None
    prepared = channel_scores.prepare(q, e, w, sums, numbers, scale, general, inverted=True)
    x, more, others, written = v, None, [], None
    if general:
        more = channel_scores.prepare(q, e, k, sums, numbers, scale, general, inverted=False)
        x = channel_kernels.outputs([(more.of_erasers, v)], None)
        others, written = [(more.of_queries, v)], (more.columns, v)
    states, z, final = channel_kernels.walk(prepared, x, sums, numbers, state, written)
    o = channel_kernels.outputs([(prepared.of_queries, z), *others], (prepared.queries, states))
    return (o, final), (sums, prepared, more, z, states)


def _forward(q, e, w, k, v, g, number, state, scale):
    results, kept = forward(q, e, w, k, v, g, number, state, scale)
    return results, (q, e, w, k, v, number, *kept)


@mosaic_gpu.lowered_once("scale")
def gradients(scale, residuals, cotangents):
    """The backward pass, from what `forward` keeps and the gradients of outputs and the final state."""
    q, e, w, k, v, number, sums, prepared, more, z, states = residuals
    do, dfinal = cotangents
    numbers = channel_tiles.numbers(number)
    dstates, dx, dstate = channel_kernels.walk_back(prepared, do, sums, numbers, dfinal)

    def of_pairs(columns, values, states):
        return channel_gradients.gradients(
            q, e, columns, values, do, dx, sums, numbers, states, dstates, scale, k is not None
        )

    found = of_pairs(w, z, states)
    dw, dk, dv = found["dw"], None, dx
    if k is not None:
        other = of_pairs(k, v, None)
        dk, found = other["dw"], {name: _sum(x, other[name]) for name, x in found.items()}
        pairs = [(more.of_queries, do), (more.of_erasers, dx)]
        dv = channel_kernels.outputs(pairs, (more.columns, dstates), transposed=True)
    dq, de = (summed(found[name], x.shape[2]) for name, x in (("dq", q), ("de", e)))
    return dq, de, dw, dk, dv, found["dg"], None, dstate


rule.defvjp(promoting(_forward), promoting(gradients))


def _sum(a, b):
    """a + b in float32, in their type."""
    return (a.astype(jnp.float32) + b.astype(jnp.float32)).astype(a.dtype)


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
