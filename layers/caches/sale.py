"""SALE: blocks of keys are read that estimates in four bits find to matter (Ji et al. 2025, arXiv:2505.24179)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from layers.caches.selecting import among_best
from layers.caches.sparse_prompt import SparsePrefill, check_positions, listed, query_blocks
from layers.caches.state import View
from layers.kernels.attention import Mask
from layers.options import NonNegative, checked_dataclass
from layers.parts.cache import Cache
from layers.segments import Visit
from layers.typing import Array, Bool, Float, Int


@checked_dataclass
class SALE(SparsePrefill):
    """SALE: prompts read the blocks of keys that low-bit estimates find to matter (Ji et al. 2025, arXiv:2505.24179).

        a'_ij = scale (round4(q_i - mean q) . round4(k_j - mean k) + mean q . (k_j - mean k) + q_i . mean k)
        r_ij = exp(a'_ij) / sum_{l near i} exp(a_il),    a the logits;    a block is read where some r_ij > threshold

    with round4 the nearest of -7 to 7 times the largest entry of a query or key by 7. Near are the blocks of the first `sinks` tokens,
    and those from `window` tokens before the block of queries to its end, which are read in any case. Means are over the queries of a
    call and the keys of the row up to its end, per head. A call on one token reads everything. The paper finds a threshold per head by
    the error of outputs on an example, here one is given for all; its code rounds several tokens with one largest entry. Estimates are
    computed from what the codes stand for, so that they show what is chosen and save no time; what is read is at most `budget`.

    Attributes:
      threshold: relative score of a block that is read.
      window: tokens before a block of queries that are near.
      sinks: first tokens that are near.
      queries: positions in a block of queries.
      block: positions in a block of keys.
      budget: the most tokens that a block of queries reads, those of largest r; a multiple of `block`. None for as many as there are.
    """

    threshold: NonNegative = 0.004
    window: int = 128
    sinks: int = 32
    queries: int = 64
    block: int = 32
    budget: int | None = None

    def __post_init__(self) -> None:
        if self.budget is None:
            return
        if self.budget % self.block:
            raise ValueError(
                f"budget={self.budget} of the cache 'sale' with block={self.block}; expected a multiple of the block"
            )
        if self.budget < (near := self.most_near * self.block):
            raise ValueError(
                f"budget={self.budget} of the cache 'sale' with window={self.window}, sinks={self.sinks}, queries={self.queries} and "
                f"block={self.block}; expected at least {near}, what is read in any case"
            )

    @property
    def most_near(self) -> int:
        """The most blocks that are near a block of queries."""
        return -(-self.sinks // self.block) + -(-(self.window + self.queries) // self.block) + 1

    def check(self, total: int, layers: Mapping[int, Any]) -> None:
        super().check(total, layers)
        check_positions("sale", layers)

    def mask(self, place: int, view: View, q: Float[Array, "b t h k"], cache: Cache, visit: Visit) -> Mask:
        keys, slots = cache.entries[0], cache.numbers.shape[1]
        count = -(-slots // self.block)
        real = visit.numbers != 0
        asked, there, number = query_blocks(q, visit, self.queries, slots)
        q_mean, k_mean = _mean(q, real), _mean(keys, cache.numbers != 0)
        positions = number[..., None] * self.queries + jnp.arange(self.queries)[None, None]
        numbers = jnp.where(there, visit.place.number[:, None, None], 0)

        def choose(one):
            """Returns the blocks that a block of queries reads, (b, h, l)."""
            asked, numbers, positions, number = one
            scores = self.scores(view, asked, numbers, positions, cache, q_mean, k_mean)
            near = self.near(number, count)[:, None] & (scores > -jnp.inf)
            scores = jnp.where(scores > jnp.log(self.threshold), scores, -jnp.inf)
            limit = count if self.budget is None else self.budget // self.block
            chosen = among_best(jnp.where(near, jnp.inf, scores), limit)
            found, index = jax.lax.top_k(chosen.astype(jnp.int32), min(limit, count))
            return jnp.where(found > 0, index, -1)

        by_block = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (asked, numbers, positions, number))
        lists = jnp.moveaxis(jax.lax.map(choose, by_block), 0, 2)
        return Mask(
            block_indices=listed(lists, number, self.queries, slots),
            block_size=self.block,
            query_block_size=self.queries,
        )

    def near(self, number: Int[Array, "b"], count: int) -> Bool[Array, "b n"]:
        """Returns which blocks of keys are near a block of queries."""
        first = jnp.arange(count)[None] * self.block
        begin = (number * self.queries)[:, None]
        inside = (first + self.block > begin - self.window) & (first < begin + self.queries)
        return inside | (first < self.sinks)

    def scores(
        self,
        view: View,
        q: Float[Array, "b i h k"],
        numbers: Int[Array, "b i"],
        positions: Int[Array, "b i"],
        cache: Cache,
        q_mean: Float[Array, "b 1 h k"],
        k_mean: Float[Array, "b 1 g k"],
    ) -> Float[Array, "b h n"]:
        """Returns log max r of each block of keys, for a block of queries; -inf where there is no pair."""
        keys = cache.entries[0]
        bias = view.bias(numbers, positions, cache.numbers[..., None], cache.positions[..., None])
        block = cache.positions // self.block
        count = -(-cache.numbers.shape[1] // self.block)
        near = jnp.take_along_axis(self.near(positions[:, 0] // self.queries, count), block, axis=1)
        exact = jnp.where(near[:, None, None], view.products(q, keys, bias), -jnp.inf)
        total = jax.nn.logsumexp(exact, axis=3, keepdims=True)
        wide_q = jnp.concatenate([rounded(q - q_mean), jnp.broadcast_to(q_mean, q.shape), q], axis=3)
        beside = jnp.broadcast_to(k_mean, keys.shape)
        wide_k = jnp.concatenate([rounded(keys - k_mean), keys - k_mean, beside], axis=3)
        scale = q.shape[3] ** -0.5 if view.scale is None else view.scale
        estimate = dataclasses.replace(view, scale=scale).products(wide_q, wide_k, bias)
        relative = jnp.where(total > -jnp.inf, estimate - total, -jnp.inf).max(2)
        index = jnp.where(cache.numbers != 0, block, count)

        def of_blocks(x, index):
            return jax.ops.segment_max(x.T, index, count + 1)[:count].T

        return jax.vmap(of_blocks)(relative, index)


def rounded(x: Float[Array, "*b k"]) -> Float[Array, "*b k"]:
    """Returns what the nearest codes from -7 to 7 stand for, with the largest entry of the last axis at 7."""
    step = jnp.abs(x).max(-1, keepdims=True) / 7
    return jnp.where(step > 0, jnp.round(x / jnp.where(step > 0, step, 1.0)) * step, 0.0)


def _mean(x: Float[Array, "b t h k"], there: Bool[Array, "b t"]) -> Float[Array, "b 1 h k"]:
    """Returns the mean over the tokens of each row that are there, float32."""
    there = there[..., None, None]
    total = jnp.where(there, x.astype(jnp.float32), 0.0).sum(1, keepdims=True)
    return total / jnp.maximum(there.sum(1, keepdims=True), 1)
