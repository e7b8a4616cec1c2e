"""The tokens that a policy keeps, chosen by each key/value head for itself."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from layers.caches.prompt import Prompt
from layers.caches.state import CacheState, View, free_slots, put, take
from layers.kernels.attention import attention
from layers.parts.cache import Cache
from layers.segments import Visit
from layers.typing import Array, Bool, Float, Int


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "numbers", "positions", "extra", "begun", "held"],
    meta_fields=["policy"],
)
@dataclasses.dataclass(frozen=True)
class Kept(CacheState):
    """Keys and values of some tokens per key/value head, with the positions that the tokens had.

    Attributes:
      keys, values: (b, n, g, k) and (b, n, g, v).
      numbers: segment of each slot's token (b, n, g), 0 where the slot is empty.
      positions: position of the token in its segment.
      extra: what the policy keeps per slot, a dict of arrays (b, n, g), 0 for a new token.
      begun: number of tokens of the prompt (b,).
      policy: the policy, which is asked at every call.
      held: what the policy keeps per row, a dict of arrays (b, ...).
    """

    keys: Any
    values: Any
    numbers: Any
    positions: Any
    extra: dict[str, Any]
    begun: Any
    policy: Any
    held: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def empty(cls, policy: Any, cache: Cache, slots: int, *extra: str) -> "Kept":
        """Returns the state before the first token, with the first of the slots of an empty cache.

        Args:
          policy: the policy.
          cache: the empty cache.
          slots: the most slots.
          extra: names of what the policy keeps per slot, float32.
        """
        keys, values = (entry[:, :slots] for entry in cache.entries)
        none = jnp.zeros(keys.shape[:3], jnp.int32)
        kept = {name: none.astype(jnp.float32) for name in extra}
        return cls(keys, values, none, none, kept, jnp.zeros(len(keys), jnp.int32), policy)

    @property
    def slots(self) -> int:
        return self.keys.shape[1]

    def like(self, cache: Cache) -> "Kept":
        keys, values = cache.entries
        empty = jnp.zeros(keys.shape[:3], jnp.int32)
        extra = {name: jnp.zeros(keys.shape[:3], x.dtype) for name, x in self.extra.items()}
        held = {name: jnp.zeros((len(empty), *x.shape[1:]), x.dtype) for name, x in self.held.items()}
        return Kept(keys, values, empty, empty, extra, jnp.zeros(len(empty), jnp.int32), self.policy, held)

    def attend(
        self,
        view: View,
        q: Float[Array, "b t h k"],
        k: Float[Array, "b t g k"],
        v: Float[Array, "b t g v"],
        visit: Visit,
    ) -> tuple[Float[Array, "b t h v"], "Kept"]:
        kept, beyond = self.added(k, v, visit)
        bias = kept.policy.adjusted(
            kept, view, q, view.bias(visit.numbers, visit.positions, kept.numbers, kept.positions)
        )
        logits = dataclasses.replace(view.logits, bias=bias)
        o = attention(q, kept.keys, kept.values, logits=logits, scale=view.scale)
        o = jnp.where(beyond[..., None, None], jnp.nan, o)
        return o, kept.policy.evicted(kept, view, q, bias, visit)

    def added(
        self,
        k: Float[Array, "b t g k"],
        v: Float[Array, "b t g v"],
        visit: Visit,
        extra: dict[str, Array] | None = None,
    ) -> tuple["Kept", Bool[Array, "b t"]]:
        """Returns the state with new tokens in empty slots, and which of them found none.

        `extra` is what is kept beside each of them, (b, t, g); 0 if it is not given.
        """
        extra = extra or {}
        index, beyond = free_slots(self.numbers, visit.numbers != 0)

        def of_tokens(x):
            return jnp.broadcast_to(x[..., None], index.shape)

        made = dataclasses.replace(
            self,
            keys=put(self.keys, index, k),
            values=put(self.values, index, v),
            numbers=put(self.numbers, index, of_tokens(visit.numbers)),
            positions=put(self.positions, index, of_tokens(visit.positions)),
            extra={
                name: put(x, index, extra.get(name, jnp.zeros(index.shape))) for name, x in self.extra.items()
            },
        )
        return made, beyond

    def only(self, chosen: Bool[Array, "b n g"]) -> "Kept":
        """Returns the state with the other slots empty."""
        return dataclasses.replace(self, numbers=jnp.where(chosen, self.numbers, 0))

    def recent(self, count: int, visit: Visit) -> Bool[Array, "b n g"]:
        """The slots of the last `count` tokens of each row, the call's own included."""
        last = (visit.place.position - count)[:, None, None]
        return (self.numbers != 0) & (self.positions >= last)


def best(
    scores: Float[Array, "b n g"], count: int, budgets: Int[Array, "#b #g"] | None = None
) -> tuple[Int[Array, "b m g"], Bool[Array, "b m g"]]:
    """Returns the slots of the largest scores of each head, in order of slots, and which of them are there.

    Of equal scores the earlier slot is taken. A score of -inf stands for no token.

    Args:
      count: m, the most slots per head.
      budgets: how many of them each row and head takes; all if None.
    """
    ranked, index = jax.lax.top_k(jnp.moveaxis(scores, 1, 2), count)
    there = ranked > -jnp.inf
    if budgets is not None:
        there &= jnp.arange(count)[None, None] < budgets[..., None]
    order = jnp.argsort(jnp.where(there, index, scores.shape[1]), axis=2, stable=True)
    index, there = (jnp.moveaxis(jnp.take_along_axis(x, order, axis=2), 2, 1) for x in (index, there))
    return index, there


def keep(
    prompt: Prompt,
    scores: Float[Array, "b s g"],
    count: int,
    room: int,
    *,
    budgets: Int[Array, "#b #g"] | None = None,
    extra: dict[str, Array] | None = None,
    held: dict[str, Array] | None = None,
) -> Kept:
    """Returns the tokens of the largest scores of a prompt, and empty slots for new ones.

    Args:
      prompt: the prompt, of whose current segment tokens are kept.
      scores: per token and key/value head; inf for tokens that are kept in any case.
      count: slots for tokens of the prompt.
      room: slots for new tokens.
      budgets: tokens per row and head, at most `count`; `count` for all if None.
      extra: what is kept beside each token, (b, s, g).
      held: what is kept per row, (b, ...).
    """
    index, there = best(
        jnp.where(prompt.live[..., None], scores, -jnp.inf), min(count, prompt.slots), budgets
    )

    def chosen(x):
        x = take(x, index)
        there_ = there.reshape(*there.shape, *(1,) * (x.ndim - 3))
        empty = jnp.zeros((), x.dtype)
        return jnp.pad(jnp.where(there_, x, empty), [(0, room if axis == 1 else 0) for axis in range(x.ndim)])

    def of_heads(x):
        return jnp.broadcast_to(x[..., None], prompt.keys.shape[:3])

    return Kept(
        chosen(prompt.keys),
        chosen(prompt.values),
        chosen(of_heads(prompt.cache.numbers)),
        chosen(of_heads(prompt.cache.positions)),
        {name: chosen(x) for name, x in (extra or {}).items()},
        prompt.length,
        prompt.policy,
        held or {},
    )


def by_group(x: Array, groups: int, axis: int = 1) -> Array:
    """Returns the mean over the query heads of each key/value head; `axis` is that of the heads."""
    return x.reshape(*x.shape[:axis], groups, -1, *x.shape[axis + 1 :]).mean(axis + 1)


def kept_best(kept: Kept, scores: Float[Array, "b n g"], count: int) -> Kept:
    """Returns the state with at most `count` tokens per head, those of the largest scores."""
    index, there = best(jnp.where(kept.numbers != 0, scores, -jnp.inf), min(count, kept.slots))
    chosen = put(jnp.zeros(scores.shape, bool), jnp.where(there, index, kept.slots), True)
    return kept.only(chosen)
