"""TokenSelect: new tokens read the tokens that most heads vote for (Wu et al. 2024, arXiv:2411.02886)."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from layers.caches.kept import Kept, best, keep
from layers.caches.policy import CachePolicy
from layers.caches.prompt import Prompt
from layers.caches.state import CacheState, View, put, softmax
from layers.options import Count, checked_dataclass
from layers.typing import Array, Float


@checked_dataclass
class TokenSelect(CachePolicy):
    """TokenSelect: new tokens read the tokens that most heads vote for (Wu et al. 2024, arXiv:2411.02886).

        s_ij = sum_heads softmax_j(a_ij),    a the logits,    j neither among the first `sinks` nor the last `recent` tokens

    A query reads the `budget` tokens of largest s, the sinks and the recent tokens, the same in all heads. All keys stay in memory. Their
    positions are true ones, where the paper numbers the chosen ones anew; its released kernel leaves the scale out of the votes.

    Attributes:
      budget: tokens that are chosen per query.
      sinks, recent: first and last tokens that are read in any case.
    """

    budget: int = 2048
    sinks: Count = 128
    recent: int = 512

    def compressed(
        self, prompts: Sequence[Prompt], views: Sequence[View], *, room: int, call: int = 1, **_: Any
    ) -> list[CacheState]:
        return [keep(prompt, jnp.zeros(prompt.keys.shape[:3]), prompt.slots, room) for prompt in prompts]

    def adjusted(
        self, kept: Kept, view: View, q: Float[Array, "b t h k"], bias: Float[Array, "b h t n"]
    ) -> Float[Array, "b h t n"]:
        # All heads hold the same tokens in the same slots.
        seen, positions = bias[:, 0] > -jnp.inf, kept.positions[:, None, :, 0]
        last = jnp.where(seen, positions, -1).max(2, keepdims=True)
        always = seen & ((positions < self.sinks) | (positions > last - self.recent))
        votes = softmax(view.products(q, kept.keys, bias)).sum(1)
        votes = jnp.where(seen & ~always, votes, -jnp.inf)
        index, there = best(jnp.moveaxis(votes, 1, 2), min(self.budget, kept.slots))
        chosen = put(
            jnp.zeros((*votes.shape[::2], votes.shape[1]), bool), jnp.where(there, index, kept.slots), True
        )
        read = always | jnp.moveaxis(chosen, 2, 1)
        return jnp.where(read[:, None], bias, -jnp.inf)
