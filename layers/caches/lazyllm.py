"""LazyLLM: a cache that lacks some tokens, which later calls may add (Fu et al. 2024, arXiv:2407.14057)."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from layers.caches.state import CacheState, View
from layers.kernels.attention import Tokens
from layers.parts.cache import Cache
from layers.parts.relative_attention import relative_attention
from layers.reduction.kept import places_of, taken
from layers.segments import Visit
from layers.typing import Array, Float


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "held", "read", "scores"],
    meta_fields=["most"],
)
@dataclasses.dataclass(frozen=True)
class LazyCache(CacheState):
    """Keys and values of the tokens that a layer has computed, each in the slot of its position; see `seqmodels.lazyllm`.

    The tokens of a call may have any positions, in order. They see those of `read` that are held and not later than themselves.

    Attributes:
      keys, values: (b, s, g, k) and (b, s, g, v).
      held: the slots (b, s) of tokens whose keys are computed.
      read: the slots of tokens that take part.
      scores: after a call, the weight (b, s) that its last token gives each of these, the mean over the query heads.
      most: the most tokens that take part.
    """

    keys: Any
    values: Any
    held: Any
    read: Any
    scores: Any
    most: int

    @property
    def slots(self) -> int:
        return self.held.shape[1]

    @classmethod
    def empty(cls, cache: Cache) -> "LazyCache":
        """Returns the state before the first token, with the slots of an empty cache."""
        none = jnp.zeros(cache.numbers.shape, bool)
        return cls(*cache.entries, none, none, none.astype(jnp.float32), none.shape[1])

    def like(self, cache: Cache) -> "LazyCache":
        return dataclasses.replace(self.empty(cache), most=self.most)

    def attend(
        self,
        view: View,
        q: Float[Array, "b t h k"],
        k: Float[Array, "b t g k"],
        v: Float[Array, "b t g v"],
        visit: Visit,
    ) -> tuple[Float[Array, "b t h v"], "LazyCache"]:
        real = visit.numbers != 0
        row, slot = jnp.arange(len(q))[:, None], jnp.where(real, visit.positions, self.slots)
        keys, values, held = (
            old.at[row, slot].set(new.astype(old.dtype), mode="drop")
            for old, new in ((self.keys, k), (self.values, v), (self.held, real))
        )
        # Those that take part side by side, so that what the others are costs nothing.
        places = places_of(held & self.read, self.most)
        numbers = (places < self.slots).astype(jnp.int32)
        near = taken(keys, places), taken(values, places)
        tokens = Tokens(numbers, visit.positions, places)
        options = dict(causal=True, segment_ids=visit.numbers, tokens=tokens, scale=view.scale)
        o = relative_attention(view.position, q, *near, logits=view.logits, **options)

        last = jnp.argmax(jnp.where(real, visit.positions, -1), axis=1)[:, None]
        one, at = taken(q, last), jnp.take_along_axis(visit.positions, last, axis=1)
        bias = view.bias(jnp.ones_like(at), at, numbers[..., None], places[..., None])
        weights = view.weights(one, near[0], bias).mean(1)[:, 0]
        scores = jnp.zeros_like(self.scores).at[row, places].set(weights, mode="drop")
        return o, dataclasses.replace(self, keys=keys, values=values, held=held, scores=scores)
