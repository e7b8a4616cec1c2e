"""`gated_linear_attention` in plain JAX: brings every call into one form and runs it in chunks (see `chunked`)."""

import functools
import math

import jax
import jax.numpy as jnp

from layers.kernels.checks import accumulation_dtype
from layers.kernels.gated_linear_attention.chunked import Settings, attend
from layers.kernels.gated_linear_attention.normalizer import divided, with_ones
from layers.kernels.mixed_precision import operand_dtype
from layers.kernels.segments import select_real
from layers.kernels.sizes import power_of_two

# Steps per chunk. Memory for scores grows with it, memory for states shrinks.
SCALAR_CHUNK = 128
CHANNEL_CHUNK = 64
# Steps over which the per-channel form writes out its sums.
LEAF = 16


@functools.partial(jax.jit, static_argnames=("scale", "normalize", "smallest", "chunk", "leaf"))
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
    chunk=None,
    leaf=None,
):
    """Runs the chunked form on arguments that the public function has checked. Chunks and leaves are powers of 2."""
    wide = accumulation_dtype(q, k, v, log_decay, bonus, initial_state)
    # The division by the denominator makes terms of the gradient cancel, for which bfloat16 is too coarse.
    dtype = wide if normalize else operand_dtype(q, k, v)
    time, width = q.shape[1], v.shape[-1]
    g = _decay(log_decay, time, wide)
    per_channel = g.ndim == 4
    heads = max(*(x.shape[2] for x in (q, k, v, g)), 0 if bonus is None else bonus.shape[0])
    groups = heads if per_channel else math.lcm(q.shape[2], k.shape[2])
    q, k, v = (_share(x.astype(dtype), count) for x, count in ((q, groups), (k, groups), (v, heads)))
    if normalize:
        # The ones, and zeros up to a multiple of 8, which suits matrix units.
        v = with_ones(v)
        v = jnp.pad(v, ((0, 0),) * 3 + ((0, -v.shape[-1] % 8),))
    state = None
    if initial_state is not None:
        missing = v.shape[-1] - initial_state.shape[-1]
        state = jnp.pad(initial_state.astype(wide), ((0, 0),) * 3 + ((0, missing),))
    number = None
    if segments is not None:
        number = segments.numbers if segments.packed else None
        q, k, v, g = (select_real(x, segments) for x in (q, k, v, g))
    chunk = power_of_two(time, chunk or (CHANNEL_CHUNK if per_channel else SCALAR_CHUNK))
    settings = Settings(
        scale=1.0 if normalize else scale,
        chunk=chunk,
        leaf=min(leaf or LEAF, chunk) if per_channel else None,
    )
    # Inside `shard_map`, what is equal on all devices must vary as v does before it enters a custom gradient.
    varying = jnp.where(False, v, 0).sum().astype(wide)
    g = g + varying
    bonus = None if bonus is None else bonus.astype(wide) + varying
    o, final = attend(settings, q, k, v, g, bonus, state, number)
    if normalize:
        return divided(o[..., : width + 1], smallest), final[..., : width + 1]
    return o, final


def _share(x, heads):
    """Repeats each head of (b, t, h, d) for all heads that share it."""
    count = heads // x.shape[2]
    if count == 1:
        return x
    x = jnp.broadcast_to(x[:, :, :, None], (*x.shape[:3], count, x.shape[3]))
    return x.reshape(*x.shape[:2], heads, x.shape[4])


def _decay(log_decay, time, dtype):
    """Log-decay as (b or 1, t, h or 1) or (b or 1, t, h, k), finite."""
    if log_decay is None:
        return jnp.zeros((1, time, 1), dtype)
    g = log_decay[None, None] if log_decay.ndim == 1 else log_decay
    # Clamp: exp underflows below this, and -inf would give 0 x inf = NaN.
    g = jnp.maximum(g, 2 * math.log(jnp.finfo(dtype).tiny))
    return jnp.broadcast_to(g.astype(dtype), (g.shape[0], time, *g.shape[2:]))
