"""Softmax attention: causal, windows, sinks, prefixes, block lists, global tokens, biases, segments, grouped heads, caches."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from layers.kernels import checks
from layers.kernels.attention import cudnn, gpu, reference, tpu, xla
from layers.kernels.attention.options import Logits, Mask, Tokens, read_options
from layers.kernels.attention.over_time import OVER_TIME, OVER_TIME_WITH_LSE
from layers.kernels.attention.pieces import Piece, compose, of_no_keys
from layers.kernels.dispatch import Implementation, by_name_only, dispatch
from layers.kernels.segments import SegmentIds
from layers.typing import Array, Float

__all__ = ["Logits", "Mask", "Piece", "Tokens", "attention", "attention_with_lse", "compose", "key_mass"]

IMPLEMENTATIONS = {
    "gpu": Implementation(gpu.attention, gpu.unsupported_reason, by_name_only, "gpu"),
    "cudnn": Implementation(cudnn.attention, cudnn.refuses, backend="gpu"),
    "tpu": Implementation(tpu.attention, tpu.unsupported_reason, tpu.passed_over_reason, "tpu"),
    "xla": Implementation(xla.attention),
    "reference": Implementation(reference.attention, passed_over_reason=by_name_only, forward_mode=True),
}
WITH_LSE = {name: one for name, one in IMPLEMENTATIONS.items() if name not in ("cudnn", "tpu")} | {
    "gpu": dataclasses.replace(IMPLEMENTATIONS["gpu"], run=gpu.attention_with_lse)
}


def attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g v"],
    *,
    causal: bool = False,
    mask: Mask | None = None,
    logits: Logits | None = None,
    segment_ids: SegmentIds = None,
    tokens: Tokens | None = None,
    scale: float | None = None,
    impl: str | None = None,
) -> Float[Array, "b t h v"]:
    """Returns the softmax attention of every query over the keys that it sees.

        a_ij = cap tanh(scale q_i . k_j / cap) + bias_ij - slope |p_i - p_j|
        o_i  = sum_j exp(a_ij) v_j / (exp(sink) + sum_j exp(a_ij)),    j over the keys that i sees

    per query head; head i reads key/value head i // (h / g). Without a cap the tanh is left out, and without a sink logit
    its term. A query that sees no key gives exactly zero, and zero gradients.

    Positions p decide what is seen and how far away it is. They are the index of the token, or with `segment_ids` the
    number of earlier real tokens of its segment. `q_positions` and `kv_positions` of `tokens` replace both, and are
    needed where positions matter and t differs from s. Query i sees key j if

        ((in the window and in a listed block) or p_j < sink_tokens or i or j is global) and (p_j <= p_i, if causal),
        or both p_i and p_j are below the row's prefix length,

    and in either case only in its own segment and below the row's `kv_lengths`.

    Vaswani et al. 2017 (arXiv:1706.03762); grouped heads: Ainslie et al. 2023 (arXiv:2305.13245); without the matrix of
    logits in memory: Dao et al. 2022 (arXiv:2205.14135); sink tokens: Xiao et al. 2023 (arXiv:2309.17453); slopes:
    Press et al. 2021 (arXiv:2108.12409).

    Forward-mode differentiation (jax.jvp) needs impl="reference". Reverse mode, and forward over reverse as in
    jax.hessian, have no such limit.

    Args:
      q, k, v: queries, keys and values; h is a multiple of g.
      causal: whether a query sees no later key.
      mask: windows, sink tokens, prefixes, lists of blocks and global tokens.
      logits: bias, slopes, cap and sink logits.
      segment_ids: (b, t) integers or `Segments`, see `layers.kernels.segments`. Without segments in `tokens` they hold for
        queries and keys alike (t = s).
      tokens: segments and positions of the keys, and positions of the queries, if these are not the same tokens.
      scale: factor of the logits, 1 / sqrt(k) if None.
      impl: "gpu", "xla", "cudnn", "tpu" (JAX's splash attention), "reference", or None for the best.

    Returns:
      The outputs (b, t, h, v), in the type of v.

    Raises:
      ValueError, TypeError: a shape, type, combination of options or `impl` does not fit; the message names the argument.
    """
    options = read_options(
        q,
        k,
        v,
        causal=causal,
        mask=mask,
        logits=logits,
        segment_ids=segment_ids,
        tokens=tokens,
        scale=scale,
    )
    if q.size == 0 or k.shape[1] == 0 or v.size == 0:
        return of_no_keys(q, v).output.astype(v.dtype)
    output, *_ = dispatch(
        "attention", IMPLEMENTATIONS, impl, over_time=OVER_TIME, q=q, k=k, v=v, options=options
    )
    return output.astype(v.dtype)


def attention_with_lse(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g v"],
    *,
    impl: str | None = None,
    **options: Any,
) -> Piece:
    """Returns `attention`, with the same options, as a `Piece` that `compose` joins to others over other keys.

    A sink logit is part of the log-sum-exp, so only one of the pieces may have it.
    """
    chosen = read_options(q, k, v, **options)
    if q.size == 0 or k.shape[1] == 0 or v.size == 0:
        return of_no_keys(q, v)
    parts = dispatch(
        "attention_with_lse", WITH_LSE, impl, over_time=OVER_TIME_WITH_LSE, q=q, k=k, v=v, options=chosen
    )
    return Piece(*parts)


def key_mass(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    *,
    query_weights: Float[Array, "#b #t #h"] | None = None,
    impl: str | None = None,
    **options: Any,
) -> Float[Array, "b s h"]:
    """Returns the attention that each key receives per query head: m_jh = sum_i w_ih p_ijh, p the weights of `attention`.

    Policies of caches and sparse prefills choose keys by it (H2O, Zhang et al. 2023, arXiv:2306.14048). It is the gradient
    of sum_i w_i o_i with respect to values of one feature, of which the outputs are a linear function, so that no matrix of
    weights is stored.

    Args:
      q, k, impl, options: as in `attention`.
      query_weights: w, such as 1 for the last queries and 0 for the others; 1 for all if None. A query of weight 0 counts
        nowhere, whatever it holds.

    Returns:
      The masses, float32 or wider.

    Raises:
      ValueError, TypeError: as `attention`.
    """
    sizes: dict[str, int] = {}
    checks.check_shape("q", q, "b t h k", sizes)
    checks.check_shape("k", k, "b s g k", sizes)
    weights = jnp.ones((1, 1, 1)) if query_weights is None else query_weights
    checks.check_real(query_weights=weights)
    checks.check_shape("query_weights", weights, "b|1 t|1 h|1", dict(sizes))
    heads, groups = sizes["h"], sizes["g"]
    if groups and heads % groups == 0:
        k = jnp.repeat(k, heads // groups, axis=2)
    dtype = checks.accumulation_dtype(q, k)
    values = jnp.zeros((*k.shape[:3], 1), dtype)
    _, transpose = jax.vjp(lambda v: attention(q, k, v, impl=impl, **options), values)
    (mass,) = transpose(jnp.broadcast_to(weights.astype(dtype), q.shape[:3])[..., None])
    return mass[..., 0]
