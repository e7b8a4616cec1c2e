"""The whole cache of a prompt, with what a policy wants to know of its queries."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from layers.caches.state import CacheState, View
from layers.kernels.attention import Tokens
from layers.parts.cache import Cache, extend
from layers.parts.relative_attention import relative_attention
from layers.segments import Visit
from layers.typing import Array, Bool, Float, Int


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["cache", "queries", "query_numbers", "query_positions", "scores"],
    meta_fields=["policy"],
)
@dataclasses.dataclass(frozen=True)
class Prompt(CacheState):
    """A cache that loses nothing, and the last queries.

    Attributes:
      cache: keys and values of all tokens, in order.
      queries: the last w queries (b, w, h, k), in order; fewer stand at the end.
      query_numbers, query_positions: segments of these, 0 where there is none, and their positions.
      scores: what the policy gathers of the queries, such as (b, s, h); None where it gathers nothing.
      policy: the policy, see `layers.caches.policy`.
    """

    cache: Cache
    queries: Any
    query_numbers: Any
    query_positions: Any
    scores: Any
    policy: Any

    @property
    def slots(self) -> int:
        return self.cache.numbers.shape[1]

    @classmethod
    def empty(cls, policy: Any, cache: Cache, heads: int) -> "Prompt":
        """Returns the state before the first token, with the slots of an empty cache."""
        b, keys, count = len(cache.numbers), cache.entries[0], policy.observed
        none = jnp.zeros((b, count), jnp.int32)
        queries = jnp.zeros((b, count, heads, keys.shape[3]), keys.dtype)
        return cls(cache, queries, none, none, policy.first_scores(cache, heads), policy)

    def like(self, cache: Cache) -> "Prompt":
        return self.empty(self.policy, cache, self.queries.shape[2])

    def attend(
        self,
        view: View,
        q: Float[Array, "b t h k"],
        k: Float[Array, "b t g k"],
        v: Float[Array, "b t g v"],
        visit: Visit,
    ) -> tuple[Float[Array, "b t h v"], "Prompt"]:
        cache, seen, beyond = extend(self.cache, (k, v), visit)
        tokens = Tokens(seen.numbers, visit.positions, seen.positions)
        options = dict(causal=True, segment_ids=visit.numbers, tokens=tokens, scale=view.scale)
        o = relative_attention(view.position, q, *seen.entries, logits=view.logits, **options)
        made = dataclasses.replace(
            self, cache=cache, scores=self.policy.scored(self.scores, view, q, cache, visit)
        )
        return jnp.where(beyond[..., None, None], jnp.nan, o), made._watched(q, visit)

    def _watched(self, q, visit):
        """Returns the state with the last of the queries that it holds and of the new ones."""
        joined = [
            jnp.concatenate(pair, axis=1)
            for pair in (
                (self.query_numbers, visit.numbers),
                (self.query_positions, visit.positions),
                (self.queries, q.astype(self.queries.dtype)),
            )
        ]
        last = jnp.argsort(joined[0] != 0, axis=1, stable=True)[:, q.shape[1] :]
        numbers, positions, queries = (
            jnp.take_along_axis(x, last.reshape(*last.shape, *(1,) * (x.ndim - 2)), axis=1) for x in joined
        )
        return dataclasses.replace(self, queries=queries, query_numbers=numbers, query_positions=positions)

    @property
    def keys(self) -> Float[Array, "b s g k"]:
        """The keys."""
        return self.cache.entries[0]

    @property
    def values(self) -> Float[Array, "b s g v"]:
        """The values."""
        return self.cache.entries[1]

    @property
    def live(self) -> Bool[Array, "b s"]:
        """The slots of tokens of the segment that each row stands in."""
        numbers = self.cache.numbers
        return (numbers != 0) & (numbers == numbers.max(1, keepdims=True))

    @property
    def length(self) -> Int[Array, "b"]:
        """The number of tokens of that segment."""
        return self.live.sum(1, dtype=jnp.int32)

    def recent(self, count: int) -> Bool[Array, "b s"]:
        """The last `count` of its tokens."""
        return self.live & (self.cache.positions >= (self.length - count)[:, None])

    def observed(self, view: View) -> Float[Array, "b h w s"]:
        """Returns the weights of attention of the last queries, 0 where a query is not there.

        p_ij = softmax_j(scale q_i . k_j),   j <= i
        """
        held = self.cache.numbers[..., None], self.cache.positions[..., None]
        bias = view.bias(self.query_numbers, self.query_positions, *held)
        return view.weights(self.queries, self.keys, bias)
