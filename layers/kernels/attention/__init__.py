"""Softmax attention: causal, windows, sinks, prefixes, block lists, biases, segments, grouped heads and caches."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layers.kernels import checks
from layers.kernels.attention import cudnn, reference, xla
from layers.kernels.attention.options import Options, check
from layers.kernels.dispatch import Implementation, by_name_only, dispatch
from layers.kernels.segments import SegmentIds
from layers.typing import Array, Float, Int

__all__ = ["Piece", "attention", "attention_with_lse", "compose"]

IMPLEMENTATIONS = {
    "cudnn": Implementation(cudnn.attention, cudnn.refuses, backend="gpu"),
    "xla": Implementation(xla.attention),
    "reference": Implementation(reference.attention, passed_over_reason=by_name_only),
}
WITH_LSE = {name: one for name, one in IMPLEMENTATIONS.items() if name != "cudnn"}


def attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g v"],
    *,
    causal: bool = False,
    window: int | None = None,
    sink_tokens: int = 0,
    prefix_lengths: Int[Array, "#b"] | None = None,
    block_indices: Int[Array, "#b #h _rows _listed"] | None = None,
    block_size: int | None = None,
    bias: Float[Array, "#b #h #t #s"] | None = None,
    slopes: Float[Array, "h"] | None = None,
    logit_cap: float | None = None,
    sink_logits: Float[Array, "h"] | None = None,
    scale: float | None = None,
    segment_ids: SegmentIds = None,
    kv_segment_ids: Int[Array, "b s"] | None = None,
    q_positions: Int[Array, "#b t"] | None = None,
    kv_positions: Int[Array, "#b s"] | None = None,
    kv_lengths: Int[Array, "b"] | None = None,
    impl: str | None = None,
) -> Float[Array, "b t h v"]:
    """Softmax attention of every query over the keys it sees.

        a_ij = cap tanh(scale q_i . k_j / cap) + bias_ij - slope |p_i - p_j|
        o_i  = sum_j exp(a_ij) v_j / (exp(sink) + sum_j exp(a_ij)),    j over the keys that i sees

    for each of h query heads; head i reads key/value head i // (h / g). Without a cap the tanh is left out, without a
    sink logit so is its term. A query that sees no key gives exactly zero, and zero gradients.

    Positions p decide what is seen and how far away it is. They are the index of the token, or with `segment_ids` the
    number of earlier real tokens of its segment; `q_positions` and `kv_positions`, always given together, replace
    both, and are needed where positions matter and t differs from s. Query i sees key j if

        ((in the window and in a listed block) or p_j < sink_tokens) and (p_j <= p_i, if causal),
        or both p_i and p_j are below the row's prefix length,

    and in either case only in its own segment and below the row's `kv_lengths`.

    Vaswani et al. 2017 (arXiv:1706.03762); grouped heads: Ainslie et al. 2023 (arXiv:2305.13245); without the matrix of
    logits in memory: Dao et al. 2022 (arXiv:2205.14135); sink tokens: Xiao et al. 2023 (arXiv:2309.17453); slopes:
    Press et al. 2021 (arXiv:2108.12409).

    Args:
      q, k, v: queries, keys and values; h is a multiple of g.
      causal: a query sees no later key.
      window: causal: the last `window` keys, the query's own included. Otherwise: keys at a distance of at most
        `window` on either side.
      sink_tokens: the first so many positions stay visible where `window` or `block_indices` would hide them.
      prefix_lengths: positions below it see each other in both directions; needs `causal`. An axis of size 1 stands
        for all rows.
      block_indices: for every block of `block_size` query positions, the blocks of as many key positions that it sees;
        -1 fills up, a block listed twice counts once. Axes of size 1 stand for all rows or heads.
      block_size: positions in a block of `block_indices`.
      bias: added to the logits; axes of size 1 stand for all. -inf hides a key.
      slopes: ALiBi, one a head, times the distance between positions.
      logit_cap: bounds the scaled logits, before bias and slopes.
      sink_logits: logit of a key without value that every query sees, one a head.
      scale: of the logits, 1 / sqrt(k) if absent.
      segment_ids: (b, t), 0 is padding, see `layers.kernels.segments`. Alone it holds for queries and keys (t = s).
      kv_segment_ids: segments of the keys, given with `segment_ids`: then a query sees the keys of equal, non-zero id,
        and positions are indices if they are not given.
      q_positions, kv_positions: positions of queries and keys.
      kv_lengths: keys at index kv_lengths or beyond, such as the unused end of a cache, are not seen.
      impl: "xla", "cudnn", "reference", or None for the best.

    Returns:
      The outputs (b, t, h, v), in the type of v.

    Raises:
      ValueError, TypeError: a shape, type, combination of options or `impl` does not fit; the message names the argument.
    """
    options = Options(
        causal=causal,
        window=window,
        sink_tokens=sink_tokens,
        prefix_lengths=prefix_lengths,
        block_indices=block_indices,
        block_size=block_size,
        bias=bias,
        slopes=slopes,
        logit_cap=logit_cap,
        sink_logits=sink_logits,
        scale=scale,
        segment_ids=segment_ids,
        kv_segment_ids=kv_segment_ids,
        q_positions=q_positions,
        kv_positions=kv_positions,
        kv_lengths=kv_lengths,
    )
    check(q, k, v, options)
    if q.size == 0 or k.shape[1] == 0 or v.size == 0:
        return _of_no_keys(q, v).output.astype(v.dtype)
    output, _ = dispatch("attention", IMPLEMENTATIONS, impl, q=q, k=k, v=v, options=options)
    return output.astype(v.dtype)


class Piece(NamedTuple):
    """Attention over some of the keys: the output (b, t, h, v) and log-sum-exp of the logits (b, t, h) of every row.

    Both float32 or wider. A row that sees none of these keys has output 0 and log-sum-exp -inf.
    """

    output: jax.Array
    lse: jax.Array


def attention_with_lse(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g v"],
    *,
    impl: str | None = None,
    **options: Any,
) -> Piece:
    """`attention`, with the same options, as a `Piece` that others over other keys can be joined to by `compose`.

    A sink logit is part of the log-sum-exp: give it to one of the pieces only.
    """
    chosen = Options(**options)
    check(q, k, v, chosen)
    if q.size == 0 or k.shape[1] == 0 or v.size == 0:
        return _of_no_keys(q, v)
    return Piece(*dispatch("attention_with_lse", WITH_LSE, impl, q=q, k=k, v=v, options=chosen))


def compose(first: Piece, second: Piece) -> Piece:
    """Attention over the keys of both pieces, as one softmax. Associative and commutative; identity Piece(0, -inf)."""
    top = jax.lax.stop_gradient(jnp.maximum(first.lse, second.lse))
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(first.lse - top), jnp.exp(second.lse - top)
    total = weights[0] + weights[1]
    empty = total == 0
    total = jnp.where(empty, 1, total)
    output = ((weights[0] / total)[..., None] * first.output) + (
        (weights[1] / total)[..., None] * second.output
    )
    return Piece(output, jnp.where(empty, -jnp.inf, top + jnp.log(total)))


def _of_no_keys(q, v) -> Piece:
    dtype = checks.accumulation_dtype(q, v)
    return Piece(jnp.zeros((*q.shape[:3], v.shape[3]), dtype), jnp.full(q.shape[:3], -jnp.inf, dtype))
