"""Task-KV: heads whose output is far from the mean of all keep everything (He et al. 2025, arXiv:2501.15113)."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from layers.caches.kept import by_group
from layers.caches.policy import CachePolicy
from layers.caches.prompt import Prompt
from layers.caches.selecting import among_best
from layers.caches.state import View
from layers.options import Count, UnitInterval, checked_dataclass
from layers.typing import Array, Bool, Float, Int


@checked_dataclass
class TaskKV(CachePolicy):
    """Task-KV: heads whose output is far from the mean of all keep everything (He et al. 2025, arXiv:2501.15113).

        e_g = o of the last token of the prompt,   d_g = |e_g - mean_g' e_g'|
        the ceil(whole G) of the G key/value heads of largest d:   all tokens of the prompt
        the others:   the first `sinks`, the last `recent`, and the `middle` others of largest sum_{i > t - recent} p_ij

    per row and layer, with means over the query heads of a key/value head. New tokens are kept by all. Slots are those of whole heads,
    so that memory is saved only where rows and layers have none. Written from the abstract of the paper.

    Attributes:
      whole: share of the heads that keep everything.
      sinks, recent: first and last tokens that others keep.
      middle: tokens between them that others keep, by the attention of the recent tokens.
    """

    whole: UnitInterval = 0.4
    sinks: Count = 4
    recent: int = 128
    middle: Count = 128

    @property
    def observed(self) -> int:
        return self.recent

    def heads(self, prompt: Prompt, view: View) -> Bool[Array, "b g"]:
        """Returns which heads keep everything."""
        groups = prompt.keys.shape[2]
        last = prompt.observed(view)[:, :, -1]
        last = last.reshape(len(last), groups, -1, prompt.slots)
        values = jnp.where(prompt.live[..., None, None], prompt.values, 0).astype(jnp.float32)
        outputs = jnp.einsum("bgrs,bsgv->bgrv", last, values, precision=jax.lax.Precision.HIGHEST).mean(2)
        distance = jnp.linalg.norm(outputs - outputs.mean(1, keepdims=True), axis=2)
        # The small number keeps 0.4 of 5 at 2.
        return among_best(distance, max(0, math.ceil(self.whole * groups - 1e-6)))

    def budgets(self, prompts: Sequence[Prompt], views: Sequence[View]) -> list[Int[Array, "b g"]]:
        some = self.sinks + self.middle + self.recent
        return [
            jnp.where(
                self.heads(prompt, view), prompt.length[:, None], jnp.minimum(some, prompt.length)[:, None]
            )
            for prompt, view in zip(prompts, views, strict=True)
        ]

    def compressed(
        self,
        prompts: Sequence[Prompt],
        views: Sequence[View],
        *,
        budgets: Sequence[Int[Array, "#b #g"]] | None = None,
        counts: Sequence[int] | None = None,
        **options: Any,
    ) -> list[Any]:
        budgets = self.budgets(prompts, views) if budgets is None else budgets
        counts = [prompt.slots for prompt in prompts] if counts is None else counts
        return super().compressed(prompts, views, budgets=budgets, counts=counts, **options)

    def scores(self, prompt: Prompt, view: View) -> Float[Array, "b s g"]:
        mass = by_group(prompt.observed(view).sum(2), prompt.keys.shape[2])
        always = (prompt.cache.positions < self.sinks) | prompt.recent(self.recent)
        return jnp.where(always[..., None], jnp.inf, jnp.moveaxis(mass, 1, 2))
