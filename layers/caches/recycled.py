"""Recycled attention: steps read what the last full step attended to most (Xu et al. 2024, arXiv:2411.05787)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from layers.caches.kept import Kept
from layers.caches.prompt import Prompt
from layers.caches.selecting import Selecting, among_best, everything, places, to_heads
from layers.caches.state import CacheState, View, softmax
from layers.options import checked_dataclass
from layers.segments import Visit
from layers.typing import Array, Bool, Float, Int


@checked_dataclass
class Recycled(Selecting):
    """Recycled attention: steps read what the last full step attended to most (Xu et al. 2024, arXiv:2411.05787).

        step s, counted from the last token of the prompt, reads all tokens if s is a multiple of `stride`, and otherwise
        the `budget` tokens of largest p_fj, and the tokens after f,    p_fj = max_heads softmax_j(a_fj),    f the last full step

    per key/value head, the largest weight of its query heads. The last token of the prompt is step 0. All keys stay in memory. The paper
    also has a schedule by the similarity of queries, which is not here.

    Attributes:
      budget: tokens that are read again.
      stride: steps from one full step to the next.
    """

    budget: int = 2048
    stride: int = 10
    observed = 1

    def compressed(
        self, prompts: Sequence[Prompt], views: Sequence[View], *, room: int, call: int = 1, **_: Any
    ) -> list[CacheState]:
        found = []
        for prompt, view in zip(prompts, views, strict=True):
            weights = prompt.observed(view)
            weights = jnp.where(prompt.live[:, None, None], weights, -jnp.inf)
            chosen = jnp.moveaxis(self.chosen(weights, prompt.keys.shape[2])[:, :, 0], 1, 2)
            found.append(everything(prompt, room, extra={"chosen": chosen}))
        return found

    def chosen(self, weights: Float[Array, "b h t n"], groups: int) -> Bool[Array, "b g t n"]:
        """Returns the tokens that queries attend to most, by key/value head."""
        b, h, t, n = weights.shape
        return among_best(weights.reshape(b, groups, h // groups, t, n).max(2), self.budget)

    def full(self, kept: Kept, bias: Float[Array, "b h t n"]) -> tuple[Bool[Array, "b t"], Int[Array, "b t"]]:
        """Returns which queries are full steps, and the positions of the last full step up to each."""
        last = places(kept, bias)[2][..., 0]
        since = (last - kept.begun[:, None] + 1) % self.stride
        return (since == 0) & (last >= 0), last - since

    def _choices(self, kept, view, q, bias):
        """Returns which queries are full steps, the positions of these, and the tokens chosen by the last one up to each query."""
        full, begun = self.full(kept, bias)
        weights = softmax(view.products(q, kept.keys, bias))
        now = self.chosen(jnp.where(bias > -jnp.inf, weights, -jnp.inf), kept.keys.shape[2])
        index = jax.lax.cummax(jnp.where(full, jnp.arange(full.shape[1]), -1), axis=1)
        at = jnp.maximum(index, 0)[:, None, :, None]
        before = jnp.moveaxis(kept.extra["chosen"], 2, 1)[:, :, None]
        return (
            full,
            begun,
            jnp.where((index >= 0)[:, None, :, None], jnp.take_along_axis(now, at, axis=2), before),
        )

    def read(
        self, kept: Kept, view: View, q: Float[Array, "b t h k"], bias: Float[Array, "b h t n"]
    ) -> Bool[Array, "b #h t n"]:
        full, begun, chosen = self._choices(kept, view, q, bias)
        later = kept.positions[:, None, :, 0] > begun[..., None]
        return to_heads(chosen, q.shape[2]) | (full[..., None] | later)[:, None]

    def evicted(
        self,
        kept: Kept,
        view: View,
        q: Float[Array, "b t h k"],
        bias: Float[Array, "b h t n"],
        visit: Visit,
    ) -> Kept:
        # Nothing is evicted: what the last full step of the call chose is read again. It saw all tokens.
        _, _, chosen = self._choices(kept, view, q, bias)
        return dataclasses.replace(kept, extra={"chosen": jnp.moveaxis(chosen[:, :, -1], 1, 2)})
