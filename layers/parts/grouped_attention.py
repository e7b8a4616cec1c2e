"""Causal attention among tokens of one group, where rows are packed or come from a cache."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from layers.kernels.attention import Mask, Tokens, attention_with_lse
from layers.segments import Segments, Visit
from layers.typing import Array, Float, Int


class Grouped(NamedTuple):
    """Where tokens stand: the numbers of their segments, 0 for none, their positions there, and their groups, from 0."""

    numbers: Int[Array, "b t"]
    positions: Int[Array, "b t"]
    groups: Int[Array, "b t"]


def grouped_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g v"],
    queries: Grouped,
    keys: Grouped,
    given: Segments | Visit | None,
    *,
    reach: int,
    **options: Any,
) -> Any:
    """Returns `attention_with_lse` of queries to the keys j <= i of the same segment and group.

    Args:
      queries, keys: where they stand.
      given: what these are from: `Segments`, the `Visit` of a call with a cache, or None for whole rows.
      reach: no key of a query's group is as many or more tokens before it.
      options: those of `attention_with_lse`.
    """
    count = jnp.maximum(queries.groups.max(initial=0), keys.groups.max(initial=0)) + 2

    def ids(side):
        return jnp.where(side.numbers == 0, 0, side.numbers * count + side.groups + 1)

    there = {"kv_segment_ids": ids(keys)}
    cached = isinstance(given, Visit)
    if cached:
        there |= {"q_positions": queries.positions, "kv_positions": keys.positions}
    return attention_with_lse(
        *(q, k, v),
        causal=True,
        # By index, tokens of a group are neighbours unless padding stands between them.
        mask=None if cached or (given is not None and given.padding != "end") else Mask(window=reach),
        segment_ids=ids(queries),
        tokens=Tokens(**there),
        **options,
    )
