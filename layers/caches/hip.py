"""HiP: blocks of keys are found by halving groups of them (Lee et al. 2024, arXiv:2406.09827)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from layers.caches.sparse_prompt import SparsePrefill, check_positions, listed, query_blocks
from layers.caches.state import View
from layers.kernels.attention import Mask
from layers.options import checked_dataclass
from layers.parts.cache import Cache
from layers.segments import Visit
from layers.typing import Array, Float, Int


@checked_dataclass
class HiP(SparsePrefill):
    """HiP: prompts read blocks of keys that are found by halving groups of them (Lee et al. 2024, arXiv:2406.09827).

        groups 0 to m - 1 of about equal size divide the blocks before the window;   m = budget // block
        until all are single blocks: halve each, and keep the m halves of largest s = max_{i in queries, j in its first block} q_i . k_j

    for each block of `queries` positions and query head, which reads these m blocks and the last `window` tokens. The search takes
    m log2(t / budget) products of blocks, and never looks at most keys. A call on one token reads everything. The authors' code (v1.1)
    scores with every second query of a block, here all do.

    Attributes:
      budget: tokens of the blocks that are found, a multiple of `block`.
      window: last tokens, up to the end of the block of queries, that are read in any case.
      queries: positions in a block of queries.
      block: positions in a block of keys.
    """

    budget: int = 512
    window: int = 256
    queries: int = 32
    block: int = 8

    def __post_init__(self) -> None:
        if self.budget % self.block:
            raise ValueError(
                f"budget={self.budget} of the cache 'hip' with block={self.block}; expected a multiple of the block"
            )

    def check(self, total: int, layers: Mapping[int, Any]) -> None:
        super().check(total, layers)
        check_positions("hip", layers)

    def mask(self, place: int, view: View, q: Float[Array, "b t h k"], cache: Cache, visit: Visit) -> Mask:
        (b, _, heads, _), slots = q.shape, cache.numbers.shape[1]
        asked, there, number = query_blocks(q, visit, self.queries, slots)
        end = jnp.minimum((number + 1) * self.queries, visit.place.position[:, None])
        before = jnp.maximum(end - self.window, 0)
        start = jnp.argmax(cache.numbers != 0, axis=1)

        def search(one):
            asked, there, before = one
            return self.found(asked, there, before, start, cache.entries[0])

        by_block = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (asked, there, before))
        found = jax.lax.map(search, by_block)
        found = jnp.moveaxis(found, 0, 2)  # b h i m
        # Blocks of the window, whole ones.
        near = before[..., None] // self.block + jnp.arange(-(-self.window // self.block) + 1)[None, None]
        near = jnp.where(near * self.block < end[..., None], near, -1)[:, None]
        lists = jnp.concatenate([found, jnp.broadcast_to(near, (b, heads, *near.shape[2:]))], axis=3)
        every = listed(lists, number, self.queries, slots)
        return Mask(block_indices=every, block_size=self.block, query_block_size=self.queries)

    def found(
        self,
        q: Float[Array, "b i h k"],
        there: Any,
        before: Int[Array, "b"],
        start: Int[Array, "b"],
        keys: Float[Array, "b s g k"],
    ) -> Int[Array, "b h m"]:
        """Returns the blocks that a block of queries reads beside the window, -1 where there are fewer.

        Args:
          q, there: the queries, and which of them are tokens.
          before: number of tokens before the window.
          start: slot of the first token of each row.
          keys: the keys, in the order of slots.
        """
        (b, _, heads, width), (slots, groups), most = q.shape, keys.shape[1:3], self.budget // self.block
        blocks = -(-before // self.block)
        grouped = q.reshape(b, -1, groups, heads // groups, width).astype(jnp.float32)

        def scores(index):
            """The largest product of a query and a key of each of the blocks (b, h, n)."""
            places = index[..., None] * self.block + jnp.arange(self.block)[None, None, None]
            inside = jnp.minimum(start[:, None, None, None] + places, slots - 1)
            inside = inside.reshape(b, groups, heads // groups, -1, self.block)
            row, group = jnp.arange(b).reshape(b, 1, 1, 1, 1), jnp.arange(groups).reshape(1, groups, 1, 1, 1)
            chosen = keys[row, inside, group].astype(jnp.float32)
            products = jnp.einsum(
                "bigrk,bgrnjk->bgrnij", grouped, chosen, precision=jax.lax.Precision.HIGHEST
            )
            # Keys up to the end of the block of queries, which has the last of them.
            end = before + self.window
            fits = there[:, None, None, None, :, None] & (
                places.reshape(b, groups, heads // groups, -1, 1, self.block) < end.reshape(b, 1, 1, 1, 1, 1)
            )
            return jnp.where(fits, products, -jnp.inf).max((4, 5)).reshape(index.shape)

        edges = blocks[:, None] * jnp.arange(most + 1)[None] // most
        edges = jnp.broadcast_to(edges[:, None], (b, heads, most + 1))
        index, size = edges[..., :-1], edges[..., 1:] - edges[..., :-1]

        def halve(carry):
            index, size, group = carry
            middle = index + size // 2
            halves = jnp.stack([index, middle], axis=3).reshape(b, heads, 2 * most)
            sizes = jnp.stack([size // 2, size - size // 2], axis=3).reshape(b, heads, 2 * most)
            ranked = jnp.where(sizes >= 1, scores(halves), -jnp.inf)
            _, best = jax.lax.top_k(ranked, most)
            goes_on = (group > 1)[:, None, None]
            chosen = (jnp.take_along_axis(x, best, axis=2) for x in (halves, sizes))
            index, size = (
                jnp.where(goes_on, new, old) for new, old in zip(chosen, (index, size), strict=True)
            )
            return index, size, group / 2

        carry = index, size, blocks.astype(jnp.float32) / most
        index, _, _ = jax.lax.while_loop(lambda carry: (carry[2] > 1).any(), halve, carry)
        every = jnp.arange(most)[None, None]
        few = blocks[:, None, None] <= most
        return jnp.where(few, jnp.where(every < blocks[:, None, None], every, -1), index)
