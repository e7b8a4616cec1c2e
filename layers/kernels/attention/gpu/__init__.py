"""`attention` of one query per row, as in decoding from a cache, by Pallas's Triton backend.

It is taken by name alone: it passes its tests on an H200, and has not been timed there as it is. The gradients are those of plain JAX, which attends once more.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from layers.kernels import pallas_triton, partition
from layers.kernels.attention import tiles, xla
from layers.kernels.attention.cudnn import batches_as_rows
from layers.kernels.attention.gpu import kernels
from layers.kernels.attention.options import Options, places
from layers.kernels.attention.schedule import one_block
from layers.kernels.mosaic_gpu import MAX_GRID, lowered_once
from layers.kernels.promotion import promoting

WIDEST = 256  # features of a head, which a program holds for all query heads that share a key/value head


def unsupported_reason(q: Any, k: Any, v: Any, options: Options) -> str | None:
    """Why these kernels cannot take a call, or None."""
    if q.shape[1] != 1:
        return f"q has {q.shape[1]} tokens; it takes one query per row"
    if q.dtype not in (jnp.bfloat16, jnp.float16) or not q.dtype == k.dtype == v.dtype:
        return f"it takes q, k and v all bfloat16 or all float16, not {q.dtype}, {k.dtype} and {v.dtype}"
    if max(k.shape[3], v.shape[3]) > WIDEST:
        return f"heads have {k.shape[3]} and {v.shape[3]} features; expected at most {WIDEST}"
    if q.shape[2] // k.shape[2] > 64:
        return f"{q.shape[2] // k.shape[2]} query heads share a key/value head; expected at most 64"
    if max(q.shape[0], q.shape[2]) > MAX_GRID:
        return f"q has {q.shape[0]} rows of {q.shape[2]} heads; expected at most {MAX_GRID} of each"
    for name in ("bias", "slopes"):
        if getattr(options.logits, name) is not None:
            return f"it takes no {name}"
    for name in ("block_indices", "global_keys", "global_queries"):
        if getattr(options.mask, name) is not None:
            return f"it takes no {name}"
    return pallas_triton.refusal(_probe)


def attention(q, k, v, options):
    """Returns output (b, 1, h, v) in the type of v, and log-sum-exp in two parts, as `parts_of_sum` gives them."""
    return _attend(
        (options.causal, options.scale, v.dtype), q, k, v, options._replace(causal=None, scale=None)
    )


def attention_with_lse(q, k, v, options):
    """Returns what `attention` does, with a float32 output."""
    static = options.causal, options.scale, jnp.dtype(jnp.float32)
    return _attend(static, q, k, v, options._replace(causal=None, scale=None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, q, k, v, options):
    return _forward(static, q, k, v, options)[0]


def _forward(static, q, k, v, options):
    given = _with(static, options)
    plan = one_block(1, k.shape[1])
    cut = xla.cut(q, k, v, given, places(q, k, given), plan=plan)
    seen = tiles.visible(cut.context, jax.tree.map(lambda x: x[0], plan.steps), cut.rules)
    seen = jnp.broadcast_to(seen[:, 0, 0, 0], (q.shape[0], k.shape[1])).astype(jnp.int8)
    rows, _, heads, _ = partition.spec_of(k, heads=2)
    spec, sums = P(rows, None, heads, None), P(rows, None, heads)
    # What follows on a sink logit is float32.
    dtype = static[2] if options.logits.sink_logits is None else jnp.dtype(jnp.float32)
    run = functools.partial(_local, float(cut.rules.scale), cut.rules.logit_cap, dtype)
    arrays, specs = (q, k, v, seen), (spec, spec, spec, P(rows, None))
    output, top, total = partition.over_shards(run, arrays, specs, (spec, sums, sums))
    log_total = jnp.log(jnp.where(total == 0, 1, total))
    output, *sums = xla.with_sink(output, top, log_total, options.logits.sink_logits)
    return (output.astype(static[2]), *sums), (q, k, v, options)


def _with(static, options):
    causal, scale, _ = static
    return options._replace(causal=causal, scale=scale)


def _backward(static, residuals, cotangents):
    def run(q, k, v, options):
        output, *sums = xla.attention(q, k, v, _with(static, options))
        return output.astype(static[2]), *sums

    return jax.vjp(run, *residuals)[1](cotangents)


_attend.defvjp(promoting(_forward), promoting(_backward))


def _local(scale, cap, dtype, q, k, v, seen):
    return batches_as_rows(functools.partial(_launched, scale, cap, dtype))(q, k, v, seen)


@lowered_once("scale", "cap", "dtype")
def _launched(scale, cap, dtype, q, k, v, seen):
    return kernels.attention(q, k, v, seen, scale, cap, dtype)


def _probe() -> None:
    """Lowers a small call."""
    q, k = (jax.ShapeDtypeStruct((1, t, 2, 64), jnp.bfloat16) for t in (1, 128))
    seen = jax.ShapeDtypeStruct((1, 128), jnp.int8)
    with jax.sharding.use_abstract_mesh(pallas_triton.hopper_mesh()):
        run = functools.partial(kernels.attention, scale=1.0, cap=None, dtype=jnp.bfloat16)
        jax.jit(run).trace(q, k, k, seen).lower(lowering_platforms=("cuda",))
