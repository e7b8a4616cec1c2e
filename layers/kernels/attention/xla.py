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

import jax
import jax.numpy as jnp

from layers.kernels.attention import tiles
from layers.kernels.attention.options import Places, places
from layers.kernels.attention.pieces import parts_of_sum
from layers.kernels.attention.schedule import Schedule, in_segments, schedule, uses_lists
from layers.kernels.checks import accumulation_dtype
from layers.kernels.promotion import joint_dtype, promoting


def attention(q, k, v, options):
    """Returns output (b, t, h, v) and log-sum-exp in two parts, as `parts_of_sum` gives them."""
    q, k, v, o = _varying_alike(q, k, v, options)
    at = places(q, k, o)
    if uses_lists(q, k, o) and in_segments(o) and o.segment_ids.padding != "end":
        # Lists go by index, so the tokens of a segment must be neighbours.
        order = jnp.argsort(at.q_segments == 0, axis=1, stable=True)
        back = jnp.argsort(order, axis=1)
        q, k, v = (jnp.take_along_axis(x, order[:, :, None, None], axis=1) for x in (q, k, v))
        at = Places(*(jnp.take_along_axis(x, order, axis=1) for x in at))
        output, top, log_total = _blocked(q, k, v, o, at)
        output = jnp.take_along_axis(output, back[:, :, None, None], axis=1)
        top, log_total = (jnp.take_along_axis(x, back[:, :, None], axis=1) for x in (top, log_total))
    else:
        output, top, log_total = _blocked(q, k, v, o, at)
    if o.logits.sink_logits is not None:
        sink = jnp.broadcast_to(o.logits.sink_logits.astype(top.dtype)[None, None], top.shape)
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


def _blocked(q, k, v, o, at):
    """Cuts the arguments into blocks of the schedule, attends, and joins the outputs."""
    (b, t, h, width), (s, g) = q.shape, k.shape[1:3]
    plan = schedule(q, k, o, at)
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
    context = _context(t, s, o, at, plan, q_length, kv_length)
    rules = tiles.Rules(
        causal=o.causal,
        window=o.mask.window,
        sink_tokens=o.mask.sink_tokens,
        block_size=o.mask.block_size,
        logit_cap=o.logits.logit_cap,
        scale=width**-0.5 if o.scale is None else o.scale,
        precision=None if dtype in (jnp.bfloat16, jnp.float16) else jax.lax.Precision.HIGHEST,
        uncertain=plan.uncertain,
    )
    output, *parts = _attend(rules, queries, keys(k), keys(v), context, plan.steps)
    output = output.transpose(0, 2, 4, 1, 3, 5).reshape(b, q_length, h, v.shape[3])[:, :t]
    return output, *(x.transpose(0, 2, 4, 1, 3).reshape(b, q_length, h)[:, :t] for x in parts)


def _context(t, s, o, at, plan: Schedule, q_length, kv_length) -> tiles.Context:
    """Places and bias in blocks; where keys had to be padded, the padding is in segment 0."""
    q_segments, kv_segments = at.q_segments, at.kv_segments
    if q_segments is None and kv_length != s:
        q_segments, kv_segments = jnp.ones((1, t), jnp.int32), jnp.ones((1, s), jnp.int32)

    def blocks(x, block, length):
        return None if x is None else _pad(x, 1, length).reshape(x.shape[0], 1, length // block, block)

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
    )


def _pad(x, axis, length):
    """Returns `x` with zeros after it, to `length` along `axis`."""
    if x.shape[axis] == length:
        return x
    return jnp.pad(x, [(0, length - x.shape[i] if i == axis else 0) for i in range(x.ndim)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rules, q, k, v, context, steps):
    """Blocked output (b, g, blocks, r, block, v), and the parts m and log l of the log-sum-exp (b, g, blocks, r, block).

    Callers stop the gradient of m: that of log l is the gradient of the log-sum-exp.
    """
    return _forward(rules, q, k, v, context, steps)[0]


def _forward(rules, q, k, v, context, steps):
    dtype = accumulation_dtype(q)
    rows = q.shape[:-1]
    # Values that a single query does not see are selected away; many queries see different ones of a block.
    single = rows[2] * rows[4] == 1
    unfit = None if single else jnp.where(jnp.isfinite(v).all(-1), 0, jnp.nan).astype(dtype)

    def step(carry, now):
        old = tuple(tiles.rows(x, now) for x in carry)

        def visit():
            top, total, output = old
            a, _ = tiles.logits(tiles.rows(q, now), tiles.columns(k, now), context, now, rules, unfit)
            vs = tiles.columns(v, now)
            vs = jnp.where((a != -jnp.inf).any((3, 4))[..., None] if single else jnp.isfinite(vs), vs, 0)
            new_top = jnp.maximum(top, a.max(-1))
            finite = jnp.where(new_top == -jnp.inf, 0, new_top)
            p = jnp.exp(a - finite[..., None])
            rescale = jnp.exp(top - finite)
            output = rescale[..., None] * output + tiles.product(
                "bgnrqk,bgnkv->bgnrqv", p.astype(v.dtype), vs, rules
            )
            return new_top, rescale * total + p.sum(-1), output

        new = _unless_hidden(visit, lambda: old, context, now, rules)
        return tuple(tiles.put_rows(x, now, y) for x, y in zip(carry, new, strict=True)), None

    carry = (
        jnp.full_like(q, -jnp.inf, dtype, shape=rows),
        jnp.zeros_like(q, dtype, shape=rows),
        jnp.zeros_like(q, dtype, shape=(*rows, v.shape[-1])),
    )
    (top, total, output), _ = jax.lax.scan(step, carry, steps)
    total = jnp.where(total == 0, 1, total)
    results = output / total[..., None], top, jnp.log(total)
    return results, (q, k, v, context, steps, *results)


def _finite(x):
    """x, with zeros for what is not finite."""
    return jnp.where(jnp.isfinite(x), x, 0)


def _unless_hidden(visit, skip, context, step, rules):
    """`visit()`, or `skip()` if no query of the step sees a key of it and that was not known before."""
    if not rules.uncertain:
        return visit()
    return jax.lax.cond(tiles.visible(context, step, rules).any(), visit, skip)


def _backward(rules, residuals, cotangents):
    q, k, v, context, steps, output, top, log_total = residuals
    doutput, _, dlse = cotangents
    # The same rounded gradients as in the products: rows of p (do . v - D) must sum to dL.
    doutput = doutput.astype(v.dtype)
    # Rows that see no key, and NaN in which nobody is interested, have no gradient. A gradient that is not finite stays
    # in its row: the row's probabilities are NaN where it sees a key.
    unwanted = ~(jnp.isfinite(output).all(-1) | (jnp.abs(doutput) > 0).any(-1) | (jnp.abs(dlse) > 0))
    off = (top == -jnp.inf) | unwanted
    top = jnp.where(jnp.isfinite(doutput).all(-1), top, jnp.nan)
    doutput = jnp.where(off[..., None], 0, _finite(doutput))
    delta = jnp.where(off, 0, (doutput * jnp.where(off[..., None], 0, output)).sum(-1) - dlse)
    dtype = top.dtype
    dslopes = None if context.slopes is None else jnp.zeros_like(q, dtype, shape=(q.shape[1], q.shape[3]))

    def step(carry, now):
        dq, dk, dv, dslopes = carry
        old_dq = tiles.rows(dq, now)

        def visit():
            qs, ks, do = tiles.rows(q, now), tiles.columns(k, now), tiles.rows(doutput, now)
            a, capped = tiles.logits(qs, ks, context, now, rules)
            seen = (a != -jnp.inf) & ~tiles.rows(off, now)[..., None]
            shift, log_sum = (tiles.rows(x, now)[..., None] for x in (top, log_total))
            p = jnp.where(seen, jnp.exp(a - shift - log_sum), 0)
            dp = tiles.product("bgnrqv,bgnkv->bgnrqk", do, _finite(tiles.columns(v, now)), rules)
            da = jnp.where(seen, p * (dp - tiles.rows(delta, now)[..., None]), 0)
            new_dv = tiles.product("bgnrqk,bgnrqv->bgnkv", p.astype(v.dtype), do, rules)
            dbias, new_dslopes = _outside(da, context, now)
            if rules.logit_cap is not None:
                da = da * (1 - (jnp.where(seen, capped, 0) / rules.logit_cap) ** 2)
            da = (da * rules.scale).astype(q.dtype)
            new_dq = old_dq + tiles.product("bgnrqk,bgnkd->bgnrqd", da, _finite(ks), rules)
            new_dk = tiles.product("bgnrqk,bgnrqd->bgnkd", da, _finite(qs), rules)
            return new_dq, new_dk, new_dv, dbias, new_dslopes

        zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros_like(q, x.dtype, shape=x.shape))
        skip = lambda: (old_dq, *zeros(jax.eval_shape(visit)[1:]))  # noqa: E731
        new_dq, new_dk, new_dv, dbias, new_dslopes = _unless_hidden(visit, skip, context, now, rules)
        dq, dk, dv = (
            tiles.put_rows(dq, now, new_dq),
            tiles.add_columns(dk, now, new_dk),
            tiles.add_columns(dv, now, new_dv),
        )
        return (dq, dk, dv, None if dslopes is None else dslopes + new_dslopes), dbias

    start = tuple(jnp.zeros_like(x, dtype) for x in (q, k, v))
    (dq, dk, dv, dslopes), dbias = jax.lax.scan(step, (*start, dslopes), steps)
    if context.bias is not None:
        # The bias of all steps is a linear function of the bias; its transpose joins their gradients.
        fetch = jax.linear_transpose(
            lambda bias: jax.vmap(lambda now: tiles.bias_columns(bias, now))(steps),
            context.bias.astype(dtype),
        )
        (dbias,) = fetch(dbias)
        dbias = dbias.astype(context.bias.dtype)
    if dslopes is not None:
        dslopes = dslopes.reshape(context.slopes.shape).astype(context.slopes.dtype)
    dcontext = context._replace(at=None, prefix_lengths=None, block_indices=None, bias=dbias, slopes=dslopes)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dcontext, None


def _outside(da, context, now):
    """Gradients of the bias of this step, as it was fetched, and of the slopes (g, r)."""
    b, g, n, r, block, keys = da.shape
    dbias = dslopes = None
    if context.bias is not None:
        shape = jax.eval_shape(tiles.bias_columns, context.bias, now).shape
        dbias = jnp.moveaxis(da, 3, 2).reshape(b, g * r, n, block, keys)
        summed = [axis for axis, size in enumerate(shape) if size != dbias.shape[axis]]
        dbias = dbias.sum(summed, keepdims=True)
    if context.slopes is not None:
        distances = tiles.by_head(jnp.abs(tiles.distances(context, now)), g).astype(da.dtype)
        dslopes = -(da * distances).sum((0, 2, 4, 5))
    return dbias, dslopes


_attend.defvjp(promoting(_forward), promoting(_backward))
