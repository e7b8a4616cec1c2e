"""H2O: the tokens that received most attention so far, and the last ones (Zhang et al. 2023, arXiv:2306.14048)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from layers.caches.kept import Kept, by_group, keep, kept_best
from layers.caches.policy import CachePolicy
from layers.caches.prompt import Prompt
from layers.caches.state import CacheState, View
from layers.options import checked_dataclass
from layers.parts.cache import Cache
from layers.segments import Visit
from layers.typing import Array, Bool, Float


@checked_dataclass
class H2O(CachePolicy):
    """H2O: heavy hitters, which received most attention so far, and the last tokens (Zhang et al. 2023, arXiv:2306.14048).

        s_j = sum_{i <= t} p_ij,   p_ij = softmax_j(q_i . k_j / sqrt(k)) over the tokens that are kept at i

    per key/value head, the mean over its query heads. After the prompt and after every new token, the last `recent` tokens stay and, of
    the others, the budget - recent of largest s. Early tokens are favoured, as more queries see them.

    Attributes:
      budget: tokens that each head keeps.
      recent: number of last tokens among them; half of the budget if None.
    """

    budget: int = 2048
    recent: int | None = None

    def __post_init__(self) -> None:
        if self.last > self.budget:
            raise ValueError(
                f"budget={self.budget} of the cache with recent={self.recent}; expected at least the recent tokens"
            )

    @property
    def last(self) -> int:
        """Number of last tokens that stay."""
        return self.budget // 2 if self.recent is None else self.recent

    def first_scores(self, cache: Cache, heads: int) -> Any:
        return jnp.zeros((*cache.numbers.shape, heads), jnp.float32)

    def scored(self, scores: Any, view: View, q: Array, cache: Cache, visit: Visit) -> Any:
        return scores + view.mass(q, cache, visit)

    def compressed(
        self, prompts: Sequence[Prompt], views: Sequence[View], *, room: int, call: int = 1, **_: Any
    ) -> list[CacheState]:
        found = []
        for prompt in prompts:
            mass = by_group(prompt.scores, prompt.keys.shape[2], axis=2)
            scores = _with_recent(mass, prompt.recent(self.last)[..., None])
            # A slot beyond the budget is free again before the next call.
            slots = min(room, call + max(0, self.budget - prompt.slots))
            found.append(keep(prompt, scores, self.budget, slots, extra={"mass": mass}))
        return found

    def evicted(
        self,
        kept: Kept,
        view: View,
        q: Float[Array, "b t h k"],
        bias: Float[Array, "b h t n"],
        visit: Visit,
    ) -> Kept:
        new = by_group(self.received(kept, view, q, bias, visit), kept.keys.shape[2])
        mass = kept.extra["mass"] + jnp.moveaxis(new, 1, 2)
        kept = dataclasses.replace(kept, extra={"mass": mass})
        return kept_best(kept, _with_recent(mass, kept.recent(self.last, visit)), self.budget)

    def received(
        self,
        kept: Kept,
        view: View,
        q: Float[Array, "b t h k"],
        bias: Float[Array, "b h t n"],
        visit: Visit,
    ) -> Float[Array, "b h n"]:
        """Returns what the queries of a call add to the scores."""
        return view.weights(q, kept.keys, bias).sum(2)


def _with_recent(mass: Float[Array, "b n g"], recent: Bool[Array, "b n #g"]) -> Float[Array, "b n g"]:
    return jnp.where(recent, jnp.inf, mass)
