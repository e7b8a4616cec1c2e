"""`attention` by splash attention, the kernels for TPUs that come with JAX, where they compute it exactly as defined.

The kernels are checked in the interpreter and compiled for a v5e; they have not run on a TPU.

They skip the blocks of keys that a causal mask or a window hides, and compare numbers of segments in the others, so that packed
rows cost what whole rows cost. There is one kernel forward, and backward one for the gradient of queries and one for those of
keys and values. They take whole blocks: shorter rows are filled with keys that nobody sees.

At 8 x 4096 tokens, 16 heads of 128 in bfloat16, under a causal mask, the kernels have 0.55 and 1.9 TFLOP of products without
those of hidden blocks, or 2.8 and 9.8 ms at the peak of a v5e; 0.54 and 1.3 GB take 0.66 and 1.6 ms. Moving heads before time
costs a pass over an array unless its producer absorbs the move.
"""

import contextlib
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec as P

from layers.kernels import kept, mosaic_tpu, partition
from layers.kernels.attention.options import beyond
from layers.kernels.partition import SEQUENCE_AXIS
from layers.kernels.segments import select_real
from layers.kernels.sequence_parallel import parts_of_time

TAKEN = "window", "logit_cap", "sink_logits"
# The most queries and keys per block, and the most bytes of a block of keys and values; blocks are multiples of LANES. With
# heads of up to WIDEST all that a block needs fits into VMEM.
BLOCK, BLOCK_BYTES, WIDEST = 512, 1 << 19, 256
# The most pairs of blocks of queries and keys, which a table in scalar memory lists.
PAIRS = 1 << 16
# The lanes of a TPU, of which the library's blocks are multiples under an interpreter too.
LANES = 128


class Settings(NamedTuple):
    """The static part of a call.

    Attributes:
      before, after: how many keys before and after its own a query sees; None is all.
      queries, keys: how many of them make a block.
      logit_cap: see `Logits`.
      interpret: see `mosaic_tpu`.
    """

    before: int | None
    after: int | None
    queries: int
    keys: int
    logit_cap: float | None
    interpret: Any


def unsupported_reason(q, k, v, options) -> str | None:
    """Why the kernels cannot take a call, or None."""
    if parts_of_time(q.shape[1]) > 1:
        return f"the mesh divides time over {SEQUENCE_AXIS!r}; the kernels need whole rows"
    if (name := beyond(options, TAKEN)) is not None:
        return f"it knows causal, {', '.join(TAKEN)}, scale and segment_ids, not {name}"
    segments = options.segment_ids
    if options.mask.window is not None and segments is not None and segments.padding != "end":
        return (
            "a window counts tokens, and padding may stand between them; `Segments.of(segment_ids, padding='end')`"
            " says that it does not"
        )
    if not q.dtype == k.dtype == v.dtype:
        return f"it takes q, k and v of one type, not {q.dtype}, {k.dtype} and {v.dtype}"
    if max(q.shape[3], v.shape[3]) > WIDEST:
        return f"it takes heads of up to {WIDEST}; those of k and v are {q.shape[3]} and {v.shape[3]}"
    if jax.typeof(q).sharding.spec[1] is not None:
        return f"q is sharded {jax.typeof(q).sharding.spec}; expected whole rows, time not sharded"
    blocks = [
        mosaic_tpu.up(x.shape[1], LANES) // size for x, size in zip((q, k), _blocks(q, k, v), strict=True)
    ]
    if math.prod(blocks) > PAIRS:
        return f"q and k have {q.shape[1]} and {k.shape[1]} tokens, {' x '.join(map(str, blocks))} blocks; expected at most {PAIRS}"
    if jax.typeof(q).manual_axis_type.varying:
        return "JAX's own kernels do not run inside jax.shard_map; pass check_vma=False to it"
    return mosaic_tpu.unavailable(q, k, v, options.logits.sink_logits)


def passed_over_reason(q, k, v, options) -> str | None:
    """Why `impl=None` does not take the kernels, or None. Calls that fill no block are left to XLA."""
    del options
    if reason := mosaic_tpu.passed_over_reason(q):
        return reason
    if q.dtype != jnp.bfloat16:
        return f"products are in {q.dtype}; the kernels are for bfloat16"
    if min(q.shape[1], k.shape[1]) < LANES or min(q.shape[3], v.shape[3]) < 64:
        return (
            f"q has {q.shape[1]} tokens, k {k.shape[1]}, and heads are {q.shape[3]} by {v.shape[3]}; expected at least "
            f"{LANES} and 64 by 64"
        )
    return None


def attention(q, k, v, options):
    """Returns the output (b, t, h, v), and None for the log-sum-exp."""
    # Heads that share keys stay together.
    rows, _, across, _ = partition.spec_of(k, heads=2)
    window, causal = options.mask.window, options.causal
    queries, keys = _blocks(q, k, v)
    settings = Settings(
        queries=queries,
        keys=keys,
        before=window if window is None else window - causal,
        after=0 if causal else window,
        logit_cap=None if options.logits.logit_cap is None else float(options.logits.logit_cap),
        interpret=mosaic_tpu.INTERPRET or False,
    )
    scale = q.shape[3] ** -0.5 if options.scale is None else float(options.scale)
    wide = P(rows, None, across, None)
    output = partition.over_shards(
        functools.partial(_local, settings, scale),
        (q, k, v, options.logits.sink_logits, options.segment_ids),
        (wide, wide, wide, P(across), P(rows, None)),
        wide,
        check=False,
    )
    return output, None


def _local(settings, scale, q, k, v, sinks, segments):
    """The attention of one device."""
    time = q.shape[1]
    # What stands at padding is multiplied by zero, which leaves NaN where it is not finite.
    q, k, v = (select_real(x, segments) for x in (q, k, v))
    missing = [-x.shape[1] % LANES for x in (q, k)]
    numbers = None
    if segments is not None:
        numbers = segments.numbers, segments.numbers
    elif any(missing) and settings.after != 0:
        numbers = tuple(jnp.ones_like(x[:, :, 0, 0], jnp.int32) for x in (q, k))
    if numbers is not None:
        numbers = tuple(jnp.pad(x, ((0, 0), (0, m))) for x, m in zip(numbers, missing, strict=True))
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    heads_first = (
        jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, m), (0, 0)))
        for x, m in zip((q, k, v), (*missing, missing[1]), strict=True)
    )
    output = _attend(settings, *heads_first, sinks, numbers)
    # Zero already; so is the gradient that the kernels get then, whatever comes back.
    return select_real(jnp.swapaxes(output, 1, 2)[:, :time], segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(settings, q, k, v, sinks, numbers):
    """The outputs (b, h, t, v) of scaled queries; `numbers` are those of the segments of queries and keys, or None."""
    with _precisely(q):
        return _rows(settings, q, k, v, sinks, numbers)


def _forward(settings, q, k, v, sinks, numbers):
    with _precisely(q):
        return jax.vjp(lambda *given: _rows(settings, *given, numbers), q, k, v, sinks)


def _backward(settings, pullback, gradient):
    del settings
    with _precisely(gradient):
        return *pullback(gradient), None


_attend.defvjp(_forward, _backward)


def _precisely(x):
    """Context in which products of float32 are not rounded to bfloat16; the library's ask for the default precision."""
    return jax.default_matmul_precision("highest") if x.dtype == jnp.float32 else contextlib.nullcontext()


def _rows(settings, q, k, v, sinks, numbers):
    """The library's kernels over all rows."""
    heads, *lengths = *q.shape[1:3], k.shape[2]
    if settings.before is None and settings.after is None:
        mask = masks.FullMask(tuple(lengths))
    else:
        mask = masks.LocalMask(tuple(lengths), (settings.before, settings.after), 0)
    sizes = splash.BlockSizes(
        block_q=settings.queries,
        block_kv=settings.keys,
        block_q_dkv=settings.queries,
        block_kv_dkv=settings.keys,
        block_q_dq=settings.queries,
        block_kv_dq=settings.keys,
    )
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        attn_logits_soft_cap=settings.logit_cap,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=kept.NAME,
        interpret=settings.interpret,
    )
    return _each(kernel, q, k, v, None if numbers is None else splash.SegmentIds(*numbers), sinks)


def _each(kernel, q, k, v, segments, sinks):
    """A kernel for one row, over all rows."""
    return jax.vmap(kernel, in_axes=(0, 0, 0, None if segments is None else 0, None))(
        q, k, v, segments, sinks
    )


def _blocks(q, k, v):
    """The queries and keys per block: the most that divide a multiple of LANES."""
    most = min(BLOCK, BLOCK_BYTES // ((q.shape[3] + v.shape[3]) * q.dtype.itemsize))
    lengths = (mosaic_tpu.up(x.shape[1], LANES) for x in (q, k))
    return [max(n for n in range(LANES, most + 1, LANES) if length % n == 0) for length in lengths]
