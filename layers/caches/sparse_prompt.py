"""A cache of all tokens that calls on several tokens read sparsely."""

import abc
import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from layers.caches.policy import CachePolicy
from layers.caches.state import CacheState, View
from layers.kernels.attention import Mask, Tokens, attention
from layers.parts.cache import Cache, extend
from layers.positions.position import Fire, T5Bias
from layers.segments import Visit
from layers.typing import Array, Bool, Float, Int


class SparsePrefill(CachePolicy, abc.ABC):
    """Base class of policies that choose what prompts read, as blocks of keys per block of queries.

    A call on one token reads everything, and all keys stay.
    """

    compresses = False

    def begin(self, cache: Cache, heads: int, place: int) -> CacheState:
        return SparsePrompt(cache, place, self)

    @abc.abstractmethod
    def mask(self, place: int, view: View, q: Float[Array, "b t h k"], cache: Cache, visit: Visit) -> Mask:
        """Returns what the queries of a call read, whose tokens the cache has.

        Only queries of the segment that a row stands in follow it; those of segments that have ended read everything.
        """


@partial(jax.tree_util.register_dataclass, data_fields=["cache"], meta_fields=["place", "policy"])
@dataclasses.dataclass(frozen=True)
class SparsePrompt(CacheState):
    """The cache.

    Attributes:
      place: number of the layer among those with a cache.
    """

    cache: Cache
    place: int
    policy: Any

    @property
    def slots(self) -> int:
        return self.cache.numbers.shape[1]

    def like(self, cache: Cache) -> "SparsePrompt":
        return dataclasses.replace(self, cache=cache)

    def attend(
        self,
        view: View,
        q: Float[Array, "b t h k"],
        k: Float[Array, "b t g k"],
        v: Float[Array, "b t g v"],
        visit: Visit,
    ) -> tuple[Float[Array, "b t h v"], "SparsePrompt"]:
        cache, seen, beyond = extend(self.cache, (k, v), visit)
        mask = None
        if q.shape[1] > 1:
            # What is chosen is that of the segment that a row stands in.
            now = visit.place.number[:, None]
            ended = visit.numbers != now
            here = visit._replace(numbers=jnp.where(ended, 0, visit.numbers))
            own = cache._replace(numbers=jnp.where(cache.numbers == now, cache.numbers, 0))
            mask = self.policy.mask(self.place, view, q, own, here)
            others = jnp.where(ended, jnp.arange(q.shape[1])[None], -1)
            mask = dataclasses.replace(mask, global_queries=others)
        o = attention(
            *(q, *seen.entries),
            causal=True,
            mask=mask,
            logits=dataclasses.replace(view.logits, slopes=view.position.slopes),
            segment_ids=visit.numbers,
            tokens=Tokens(seen.numbers, visit.positions, seen.positions),
            scale=view.scale,
        )
        return jnp.where(beyond[..., None, None], jnp.nan, o), dataclasses.replace(self, cache=cache)


def query_blocks(
    q: Float[Array, "b t h k"], visit: Visit, size: int, slots: int
) -> tuple[Float[Array, "b n i h k"], Bool[Array, "b n i"], Int[Array, "b n"]]:
    """Returns the queries of a call in blocks of `size` positions, which of them are there, and the numbers of the blocks."""
    (b, time), real = q.shape[:2], visit.numbers != 0
    first = jnp.where(real, visit.positions, slots).min(1) // size
    count = -(-time // size) + 1  # of blocks that the queries of a call may lie in
    # Queries by their position in the blocks; others fall beyond.
    index = jnp.where(real, visit.positions - first[:, None] * size, count * size)
    row, shape = jnp.arange(b)[:, None], (b, count, size)
    there = jnp.zeros((b, count * size), bool).at[row, index].set(True, mode="drop").reshape(shape)
    asked = jnp.zeros((b, count * size, *q.shape[2:]), q.dtype).at[row, index].set(q, mode="drop")
    return asked.reshape(*shape, *q.shape[2:]), there, first[:, None] + jnp.arange(count)[None]


def listed(
    lists: Int[Array, "b h n l"], number: Int[Array, "b n"], size: int, slots: int
) -> Int[Array, "b h m l"]:
    """Returns lists of blocks of keys at the numbers of their blocks of queries, and empty ones for others."""
    b, heads, count, length = lists.shape
    every = jnp.full((b, heads, -(-slots // size) + count, length), -1, jnp.int32)
    row, head = jnp.arange(b)[:, None, None], jnp.arange(heads)[None, :, None]
    return every.at[row, head, number[:, None]].set(lists, mode="drop")


def check_positions(name: str, layers: Mapping[int, Any]) -> None:
    """Raises ValueError for positions whose bias a sparse call would have to hold in full."""
    for layer, config in layers.items():
        if isinstance(config.position, T5Bias | Fire):
            raise ValueError(
                f"position={config.position!r} of layer {layer} does not fit the cache {name!r}; expected rope, alibi or none"
            )
