"""The definition of `attention`: the whole matrix of logits, masked, in float32 or wider."""

import jax
import jax.numpy as jnp

from layers.kernels.attention.options import places
from layers.kernels.attention.pieces import parts_of_sum
from layers.kernels.checks import accumulation_dtype


def attention(q, k, v, options):
    """Returns the output (b, t, h, v), the log-sum-exp per row (b, t, h), and what rounding took from that."""
    o, mask = options, options.mask
    dtype = accumulation_dtype(q, k, v, o.logits.bias, o.logits.slopes, o.logits.sink_logits)
    repeats = q.shape[2] // k.shape[2]
    q, k, v = (
        q.astype(dtype),
        jnp.repeat(k.astype(dtype), repeats, 2),
        jnp.repeat(v.astype(dtype), repeats, 2),
    )
    # A product would multiply what is hidden by zero, and 0 x NaN is NaN. Rows that see such a number are set at the end.
    bad_q, bad_k, bad_v = (~jnp.isfinite(x).all(-1).swapaxes(1, 2) for x in (q, k, v))
    q, k, v = (jnp.where(jnp.isfinite(x), x, 0) for x in (q, k, v))
    exact = jax.lax.Precision.HIGHEST
    at = places(q, k, o)
    i, j = at.q_positions[:, None, :, None], at.kv_positions[:, None, None, :]

    scale = q.shape[-1] ** -0.5 if o.scale is None else o.scale
    logits = scale * jnp.einsum("bthk,bshk->bhts", q, k, precision=exact)
    if o.logits.logit_cap is not None:
        logits = o.logits.logit_cap * jnp.tanh(logits / o.logits.logit_cap)
    if o.logits.bias is not None:
        logits = logits + jnp.where(jnp.isfinite(o.logits.bias), o.logits.bias, 0).astype(dtype)
    if o.logits.slopes is not None:
        logits = logits - o.logits.slopes.astype(dtype)[None, :, None, None] * jnp.abs(i - j).astype(dtype)

    seen = jnp.ones_like(logits, bool)
    if mask.window is not None:
        steps = (i - j) // mask.dilation
        seen &= (steps < mask.window) if o.causal else (jnp.abs(steps) <= mask.window)
        seen &= steps * mask.dilation == i - j
    if mask.block_indices is not None:
        row = jnp.clip(i // mask.list_size, 0, mask.block_indices.shape[2] - 1)
        shape = (*logits.shape[:3], mask.block_indices.shape[3])
        listed = jnp.broadcast_to(mask.block_indices, (*shape[:2], *mask.block_indices.shape[2:]))
        listed = jnp.take_along_axis(listed, jnp.broadcast_to(row, (*shape[:3], 1)), axis=2)
        seen &= (listed[..., None, :] == (j // mask.block_size)[..., None]).any(-1)
        seen &= row == i // mask.list_size
    if mask.sink_tokens:
        seen |= j < mask.sink_tokens
    if mask.global_keys is not None:
        indices = jnp.arange(k.shape[1], dtype=jnp.int32)[None, None, None]
        seen |= (mask.global_keys[..., None] == indices).any(2)[:, :, None]
    if mask.global_queries is not None:
        indices = jnp.arange(q.shape[1], dtype=jnp.int32)[None, None]
        seen |= (mask.global_queries[..., None] == indices).any(1)[:, None, :, None]
    if o.causal:
        seen &= j <= i
    if mask.prefix_lengths is not None:
        prefix = mask.prefix_lengths[:, None, None, None]
        seen |= (i < prefix) & (j < prefix)
    if at.q_segments is not None:
        q_segments, kv_segments = at.q_segments[:, None, :, None], at.kv_segments[:, None, None, :]
        seen &= (q_segments == kv_segments) & (q_segments != 0)

    unfit = bad_q[..., None] | (bad_k | bad_v)[:, :, None]
    if o.logits.bias is not None:
        seen &= o.logits.bias != -jnp.inf
        unfit |= ~jnp.isfinite(o.logits.bias)
    spoiled = (seen & unfit).any(3)

    logits = jnp.where(seen, logits, -jnp.inf)
    if o.logits.sink_logits is not None:
        sink = jnp.broadcast_to(
            o.logits.sink_logits.astype(dtype)[None, :, None, None], (*logits.shape[:3], 1)
        )
        logits = jnp.concatenate([logits, sink], axis=3)
    top = jax.lax.stop_gradient(logits.max(3, keepdims=True))
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(logits - top)
    total = weights.sum(3, keepdims=True)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    probabilities = (weights / total)[..., : k.shape[1]]
    output = jnp.einsum("bhts,bshv->bthv", probabilities, v, precision=exact)
    # Selected, so that a gradient that is not finite stays in a row that sees nothing.
    output = jnp.where(jnp.swapaxes(seen.any(3), 1, 2)[..., None], output, 0)
    output = jnp.where(jnp.swapaxes(spoiled, 1, 2)[..., None], jnp.nan, output)
    top, log_total = (x[..., 0].swapaxes(1, 2) for x in (jnp.where(empty, -jnp.inf, top), jnp.log(total)))
    return output, *parts_of_sum(jnp.where(spoiled.swapaxes(1, 2), jnp.nan, top), log_total)
