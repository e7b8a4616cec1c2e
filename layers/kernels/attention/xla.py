"""`attention` in plain JAX, without the matrix of logits in memory.

Queries and keys are cut into blocks, and steps of a `lax.scan` visit blocks of logits (see `schedule`). Every row keeps
the running maximum m of its logits, the sum l of exp(a - m) and the output so far, rescaled whenever m grows. At the
end the output is divided by l, and L = m + log l is its log-sum-exp. The backward pass takes the same steps and
recomputes the probabilities from m and log l, which are kept apart: their sum rounds log l away where m is large,

    p = exp(a - m - log l),  da = p (do . v - D),  D = do . o - dL,  dv = p^T do,  dq = scale da k,  dk = scale da^T q,

so that it needs only q, k, v, o, m and log l. The sink logit is an outer step: it scales the output by sigmoid(L - sink).

A number that is not finite makes the rows that see it NaN and no others, although a product multiplies what is hidden by
zero: products take such numbers as zero, and the logits of the rows that see them are NaN.

Memory: one step of logits (`STEP_BYTES`, a few times) besides the arguments, the output, and float32 sums of the size of
the output (forward) or of q, k and v (backward). Traffic is mostly that of the logits: with bfloat16 inputs about 16 bytes
per visited logit forward (product, maximum, exponential and its sum, product) and about 40 backward. On a GPU, query blocks
of a step that fetched the same key block add their gradients to it in no fixed order.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels import kept
from layers.kernels.attention import passes, tiles
from layers.kernels.attention.global_tokens import with_global_tokens
from layers.kernels.attention.options import Places, places
from layers.kernels.attention.pieces import Results, parts_of_sum
from layers.kernels.attention.schedule import Schedule, Steps, in_segments, schedule, uses_lists
from layers.kernels.promotion import joint_dtype, promoting


def attention(q, k, v, options):
    """Returns output (b, t, h, v) and log-sum-exp in two parts, as `parts_of_sum` gives them."""
    q, k, v, o = _varying_alike(q, k, v, options)
    results = with_global_tokens(_in_order, q, k, v, o, places(q, k, o))
    return with_sink(*results, o.logits.sink_logits)


def _in_order(q, k, v, o, at, aside):
    """Returns the results over all keys but those that are `aside` (b|1, h|1, s), by blocks of neighbouring tokens."""
    if uses_lists(q, k, o) and in_segments(o) and o.segment_ids.padding != "end":
        # Lists go by index, so the tokens of a segment must be neighbours.
        order = jnp.argsort(at.q_segments == 0, axis=1, stable=True)
        back = jnp.argsort(order, axis=1)
        q, k, v = (jnp.take_along_axis(x, order[:, :, None, None], axis=1) for x in (q, k, v))
        at = Places(*(jnp.take_along_axis(x, order, axis=1) for x in at))
        if aside is not None:
            aside = jnp.take_along_axis(
                jnp.broadcast_to(aside, (order.shape[0], *aside.shape[1:])), order[:, None], axis=2
            )
        output, top, log_total = _blocked(q, k, v, o, at, aside)
        output = jnp.take_along_axis(output, back[:, :, None, None], axis=1)
        top, log_total = (jnp.take_along_axis(x, back[:, :, None], axis=1) for x in (top, log_total))
        return Results(output, top, log_total)
    return _blocked(q, k, v, o, at, aside)


def with_sink(output, top, log_total, sink_logits):
    """Returns output and log-sum-exp as `attention` does, with the sink logits (h,) if they are given."""
    if sink_logits is not None:
        sink = jnp.broadcast_to(sink_logits.astype(top.dtype)[None, None], top.shape)
        # What is not finite in a row that is not wanted must not reach the gradient of the sink.
        spoiled, finite = jnp.isnan(top) | jnp.isnan(log_total), jnp.isfinite(output)
        excess = jnp.where(spoiled, 0, (jax.lax.stop_gradient(top) - sink) + log_total)
        output = jnp.where(finite, jnp.where(finite, output, 0) * jax.nn.sigmoid(excess)[..., None], output)
        return output, *parts_of_sum(sink, jnp.where(spoiled, jnp.nan, jax.nn.softplus(excess)))
    return output, *parts_of_sum(jax.lax.stop_gradient(top), log_total)


def _varying_alike(*arguments):
    """The arguments unchanged; under `shard_map` those that are equal on all devices count as varying.

    The gradient of what is equal everywhere is then summed over devices, outside the custom VJP.
    """
    arrays = [x for x in jax.tree.leaves(arguments) if isinstance(x, jax.Array)]
    zero = sum(jnp.zeros_like(x, jnp.float32, shape=()) for x in arrays)

    def vary(x):
        real = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)
        return x + zero.astype(x.dtype) if real else x

    return jax.tree.map(vary, arguments)


class Cut(NamedTuple):
    """Arguments in blocks of a schedule, as `passes` takes them; `cut` makes it."""

    rules: tiles.Rules
    q: jax.Array
    k: jax.Array
    v: jax.Array
    context: tiles.Context
    steps: Steps

    def rows(self, x, fill=0):
        """An array of queries (b, t, h, ...) in blocks (b, g, blocks, r, block, ...), filled up with `fill`."""
        b, g, blocks, r, block = self.q.shape[:5]
        x = _pad(x, 1, blocks * block, fill).reshape(b, blocks, block, g, r, *x.shape[3:])
        return jnp.moveaxis(x, (3, 4), (1, 3))

    def of_rows(self, x, t):
        """The inverse of `rows`, for t queries."""
        b, g, blocks, r, block = self.q.shape[:5]
        return jnp.moveaxis(x, (1, 3), (3, 4)).reshape(b, blocks * block, g * r, *x.shape[5:])[:, :t]

    def of_keys(self, x, s):
        """Keys in blocks (b, g, blocks, block, d) as an array (b, s, g, d)."""
        x = jnp.moveaxis(x, 1, 3)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :s]

    def of_bias(self, x, bias):
        """A bias in blocks as an array of the shape of `bias`."""
        _, _, blocks, block, kv_blocks, kv_block = x.shape
        x = x.reshape(*x.shape[:2], blocks * block, kv_blocks * kv_block)
        return x[:, :, : bias.shape[2], : bias.shape[3]]


def cut(q, k, v, o, at, aside=None, plan: Schedule | None = None) -> Cut:
    """Returns the arguments in the blocks of a schedule, their own if `plan` is None.

    `at` are the places of queries and keys, and `aside` (b|1, h|1, s) are keys that are left out.
    """
    (b, t, h, width), (s, g) = q.shape, k.shape[1:3]
    plan = plan or schedule(q, k, o, at)
    dtype = joint_dtype(q, k, v)
    groups = h if plan.steps.blocks.shape[2] > 1 else g
    q_length, kv_length = plan.q_blocks * plan.q_block, plan.kv_blocks * plan.kv_block

    def keys(x):
        x = _pad(x.astype(dtype), 1, kv_length)
        return x.reshape(b, plan.kv_blocks, plan.kv_block, *x.shape[2:]).transpose(0, 3, 1, 2, 4)

    queries = _pad(q.astype(dtype), 1, q_length)
    queries = queries.reshape(b, plan.q_blocks, plan.q_block, groups, h // groups, width).transpose(
        0, 3, 1, 4, 2, 5
    )
    context = _context(t, s, o, at, aside, plan, q_length, kv_length)
    rules = tiles.Rules(
        causal=o.causal,
        window=o.mask.window if o.mask.window is None else o.mask.reach(o.causal),
        dilation=o.mask.dilation,
        sink_tokens=o.mask.sink_tokens,
        block_size=o.mask.block_size,
        list_size=o.mask.list_size,
        logit_cap=o.logits.logit_cap,
        scale=width**-0.5 if o.scale is None else o.scale,
        precision=tiles.precision_of(dtype),
        uncertain=plan.uncertain,
    )
    return Cut(rules, queries, keys(k), keys(v), context, plan.steps)


def _blocked(q, k, v, o, at, aside):
    """Attends over blocks, and joins the results."""
    parts = cut(q, k, v, o, at, aside=aside)
    return Results(*(parts.of_rows(x, q.shape[1]) for x in _attend(*parts)))


def _context(t, s, o, at, aside, plan: Schedule, q_length, kv_length) -> tiles.Context:
    """Places and bias in blocks; where keys had to be padded, the padding is in segment 0."""
    q_segments, kv_segments = at.q_segments, at.kv_segments
    if q_segments is None and kv_length != s:
        q_segments, kv_segments = jnp.ones((1, t), jnp.int32), jnp.ones((1, s), jnp.int32)

    def blocks(x, block, length):
        if x is None:
            return None
        x = x[:, None] if x.ndim == 2 else x
        return _pad(x, 2, length).reshape(*x.shape[:2], length // block, block)

    bias = o.logits.bias
    if bias is not None:
        for axis, (block, length) in ((2, (plan.q_block, q_length)), (4, (plan.kv_block, kv_length))):
            whole = bias.shape[axis] == 1
            bias = bias if whole else _pad(bias, axis, length)
            count = (1, 1) if whole else (length // block, block)
            bias = bias.reshape(*bias.shape[:axis], *count, *bias.shape[axis + 1 :])
    return tiles.Context(
        Places(
            blocks(at.q_positions, plan.q_block, q_length),
            blocks(at.kv_positions, plan.kv_block, kv_length),
            blocks(q_segments, plan.q_block, q_length),
            blocks(kv_segments, plan.kv_block, kv_length),
        ),
        bias,
        o.mask.prefix_lengths,
        o.mask.block_indices,
        o.logits.slopes,
        blocks(aside, plan.kv_block, kv_length),
    )


def _pad(x, axis, length, fill=0):
    """Returns `x` with `fill` after it, to `length` along `axis`."""
    if x.shape[axis] == length:
        return x
    widths = [(0, length - x.shape[i] if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=fill)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rules, q, k, v, context, steps):
    """Blocked output, and the parts m and log l of the log-sum-exp; see `passes.forward`.

    Callers stop the gradient of m: that of log l is the gradient of the log-sum-exp.
    """
    return passes.forward(rules, q, k, v, context, steps)


def _forward(rules, q, k, v, context, steps):
    results = kept.named(passes.forward(rules, q, k, v, context, steps))
    return results, (q, k, v, context, steps, results)


def _backward(rules, residuals, cotangents):
    q, k, v, context, steps, results = residuals
    doutput, _, dlse = cotangents
    rows = passes.rows_of(*results, doutput.astype(v.dtype), dlse)
    found = passes.backward(rules, q, k, v, context, steps, rows)
    dbias, dslopes = (
        None if one is None else one.astype(of.dtype)
        for one, of in ((found.bias, context.bias), (found.slopes, context.slopes))
    )
    dcontext = tiles.Context(*[None] * len(context))._replace(bias=dbias, slopes=dslopes)
    return found.q.astype(q.dtype), found.k.astype(k.dtype), found.v.astype(v.dtype), dcontext, None


_attend.defvjp(promoting(_forward), promoting(_backward))
