"""Attention of the queries of one device over the keys of one part of time, and how such visits become one softmax."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels import kept
from layers.kernels.attention import fused_visits, passes, tiles, xla
from layers.kernels.attention.options import Logits, Options, Places, Tokens
from layers.kernels.attention.passes import Rows
from layers.kernels.attention.pieces import Results
from layers.kernels.attention.schedule import one_block
from layers.kernels.checks import accumulation_dtype
from layers.kernels.promotion import joint_dtype, promoting


class Arrays(NamedTuple):
    """The arrays of a call besides queries, keys and values, as the options hold them; None if not given."""

    bias: Any = None
    slopes: Any = None
    prefix_lengths: Any = None
    block_indices: Any = None


def with_gradient(
    forward: Callable[..., Results], backward: Callable[..., tuple[Any, ...]]
) -> Callable[..., Results]:
    """Returns `attend(plan, q, k, v, arrays, at)`: the results of this device's queries over the keys of all devices.

    `plan` is static; q, k and v are this device's tokens, in the order of the plan; `arrays` is an `Arrays`; `at` are the places
    of this device's tokens, None if the place of a token is its index and there are no segments.

    Args:
      forward: `attend` without gradients.
      backward: (plan, (q, k, v, arrays, at, results), gradients of the results) -> gradients of q, k, v, arrays and at.
    """

    def kept_forward(plan, q, k, v, arrays, at):
        results = kept.named(forward(plan, q, k, v, arrays, at))
        return results, (q, k, v, arrays, at, results)

    attend = jax.custom_vjp(forward, nondiff_argnums=(0,))
    attend.defvjp(promoting(kept_forward), promoting(backward))
    return attend


def split_options(options: Options) -> tuple[Options, Arrays]:
    """Returns the options without arrays, which can be hashed, and their arrays without those of `Tokens`."""
    mask, logits = options.mask, options.logits
    static = Options(
        options.causal,
        dataclasses.replace(mask, prefix_lengths=None, block_indices=None),
        Logits(logit_cap=logits.logit_cap),
        scale=options.scale,
    )
    return static, Arrays(logits.bias, logits.slopes, mask.prefix_lengths, mask.block_indices)


def attended(plan: Any, q, k, v, arrays: Arrays, at: Places) -> Results:
    """Returns the results over these keys alone."""
    if plan.fused:
        return fused_visits.attended(plan, q, k, v, at)
    parts = _cut(plan.options, q, k, v, arrays, at)
    return Results(*(parts.of_rows(x, q.shape[1]) for x in passes.forward(*parts)))


def scores(static: Options, q, k, arrays: Arrays, at: Places) -> jax.Array:
    """Returns the logits (b, g, r, t, s) over these keys, -inf where hidden; r queries of a head share one of g heads of keys."""
    parts = _cut(static, q, k, k, arrays, at, one_block(q.shape[1], k.shape[1]))
    step = jax.tree.map(lambda x: x[0], parts.steps)
    return tiles.logits(parts.q, tiles.columns(parts.k, step), parts.context, step, parts.rules)[0][:, :, 0]


def of_no_keys(q, v) -> Results:
    """The results over no keys, with which `merged` begins."""
    dtype = accumulation_dtype(q, v)
    rows = q.shape[:3]
    zeros = functools.partial(jnp.zeros_like, q, dtype)
    return Results(
        zeros(shape=(*rows, v.shape[3])), jnp.full_like(q, -jnp.inf, dtype, shape=rows), zeros(shape=rows)
    )


def rows_of(plan: Any, q, k, v, results: Results, doutput, dlse) -> Rows | fused_visits.FusedRows:
    """Returns what `gradients` needs, for gradients of the output and of the log-sum-exp."""
    if plan.fused:
        return fused_visits.rows_of(q, results, doutput)
    return passes.rows_of(*results, doutput.astype(joint_dtype(q, k, v)), dlse)


def gradients(
    plan: Any, q, k, v, arrays: Arrays, at: Places, rows: Rows | fused_visits.FusedRows
) -> passes.Gradients:
    """Returns what these keys give to the gradients of a softmax with these rows, in the type of sums."""
    if plan.fused:
        return passes.Gradients(*fused_visits.gradients(plan, q, k, v, at, rows), None, None)
    parts = _cut(plan.options, q, k, v, arrays, at)
    blocked = Rows(*(parts.rows(x, fill) for x, fill in zip(rows, (-jnp.inf, 0, 0, 0), strict=True)))
    found = passes.backward(*parts, blocked)
    t, s = q.shape[1], k.shape[1]
    dbias = None if found.bias is None else parts.of_bias(found.bias, arrays.bias)
    return passes.Gradients(
        parts.of_rows(found.q, t),
        parts.of_keys(found.k, s),
        parts.of_keys(found.v, s),
        dbias,
        found.slopes,
    )


class Sums(NamedTuple):
    """Gradients over the visits so far, of what does not travel."""

    tokens: Any
    bias: Any
    slopes: Any


def no_gradients(tokens, arrays: Arrays, dtype) -> Sums:
    """The sums of no visits; `tokens` is an array, or a tree of arrays, of this device's tokens."""
    return Sums(*jax.tree.map(lambda x: jnp.zeros_like(x, dtype), (tokens, arrays.bias, arrays.slopes)))


def added(sums: Sums, tokens, found: passes.Gradients, axis: int, index) -> Sums:
    """Returns the sums after a visit, of which the bias had the entries `index` along `axis`."""
    bias = sums.bias
    if bias is not None:
        where = (*[slice(None)] * axis, index)
        whole = bias.shape[axis] == 1
        bias = bias + found.bias if whole else bias.at[where].add(found.bias, mode="promise_in_bounds")
    slopes = None if found.slopes is None else sums.slopes + found.slopes
    return Sums(jax.tree.map(jnp.add, sums.tokens, tokens), bias, slopes)


def with_bias_of(arrays: Arrays, axis: int, index) -> Arrays:
    """Returns the arrays with the entries `index` of the bias along `axis`."""
    if arrays.bias is None or arrays.bias.shape[axis] == 1:
        return arrays
    return arrays._replace(bias=jnp.take(arrays.bias, index, axis=axis, mode="clip"))


def in_types_of(gradients: Any, arrays: Any) -> Any:
    """Returns gradients in the types of the arrays that they are of; None where an array has none."""
    return jax.tree.map(lambda x, of: x.astype(of.dtype), gradients, arrays)


def _cut(static, q, k, v, arrays, at, plan=None):
    options = Options(
        static.causal,
        dataclasses.replace(
            static.mask, prefix_lengths=arrays.prefix_lengths, block_indices=arrays.block_indices
        ),
        Logits(arrays.bias, arrays.slopes, static.logits.logit_cap),
        tokens=Tokens(q_positions=at.q_positions, kv_positions=at.kv_positions),
        scale=static.scale,
    )
    parts = xla.cut(q, k, v, options, at, plan=plan)
    # A visit may turn out to be wholly hidden, and then costs nothing.
    return parts._replace(rules=parts.rules._replace(uncertain=True))
