"""Attention of the queries of one device over the keys of one part of time, and how such visits become one softmax."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels.attention import passes, xla
from layers.kernels.attention.options import Logits, Options, Places, Tokens
from layers.kernels.attention.passes import Rows
from layers.kernels.attention.pieces import Results
from layers.kernels.checks import accumulation_dtype
from layers.kernels.promotion import joint_dtype


class Arrays(NamedTuple):
    """The arrays of a call besides queries, keys and values, as the options hold them; None if not given."""

    bias: Any = None
    slopes: Any = None
    prefix_lengths: Any = None
    block_indices: Any = None


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


def attended(static: Options, q, k, v, arrays: Arrays, at: Places) -> Results:
    """Returns the results over these keys alone."""
    parts = _cut(static, q, k, v, arrays, at)
    return Results(*(parts.of_rows(x, q.shape[1]) for x in passes.forward(*parts)))


def of_no_keys(q, v) -> Results:
    """The results over no keys, with which `merged` begins."""
    dtype = accumulation_dtype(q, v)
    rows = q.shape[:3]
    zeros = functools.partial(jnp.zeros_like, q, dtype)
    return Results(
        zeros(shape=(*rows, v.shape[3])), jnp.full_like(q, -jnp.inf, dtype, shape=rows), zeros(shape=rows)
    )


def rows_of(q, k, v, results: Results, doutput, dlse) -> Rows:
    """Returns `passes.rows_of` for gradients of the output and of the log-sum-exp."""
    return passes.rows_of(*results, doutput.astype(joint_dtype(q, k, v)), dlse)


def gradients(static: Options, q, k, v, arrays: Arrays, at: Places, rows: Rows) -> passes.Gradients:
    """Returns what these keys give to the gradients of a softmax with these rows, in the type of sums."""
    parts = _cut(static, q, k, v, arrays, at)
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


def _cut(static, q, k, v, arrays, at):
    options = Options(
        static.causal,
        dataclasses.replace(
            static.mask, prefix_lengths=arrays.prefix_lengths, block_indices=arrays.block_indices
        ),
        Logits(arrays.bias, arrays.slopes, static.logits.logit_cap),
        tokens=Tokens(q_positions=at.q_positions, kv_positions=at.kv_positions),
        scale=static.scale,
    )
    parts = xla.cut(q, k, v, options, at)
    # A visit may turn out to be wholly hidden, and then costs nothing.
    return parts._replace(rules=parts.rules._replace(uncertain=True))
