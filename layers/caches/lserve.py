"""LServe: streaming heads, and pages that the others choose by bounds of their keys (Yang et al. 2025, arXiv:2502.14866)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from layers.caches.duoattention import DuoAttention, TwoKinds
from layers.caches.kept import Kept
from layers.caches.prompt import Prompt
from layers.caches.selecting import among_best, everything, places, to_heads
from layers.caches.state import CacheState, View
from layers.options import checked_dataclass
from layers.parts.position_blocks import block_index
from layers.segments import Visit
from layers.typing import Array, Bool, Float


@checked_dataclass
class LServe(DuoAttention):
    """LServe: streaming heads as in DuoAttention; the others read pages of keys that they choose (Yang et al. 2025, arXiv:2502.14866).

        S_l = sum_c max(q_c max_{j in l} k_jc, q_c min_{j in l} k_jc),   S_p = max_{l in p} S_l,   the largest over query heads

    of logical pages l of `logical` tokens in physical pages p of `page` tokens. After the prompt a new token reads, per key/value
    head, the budget // page pages of largest S, its own page, the first `sinks` and the last `recent` tokens. Pages are chosen again after
    `reuse` steps.
    The prompt is read as by DuoAttention. All keys of these heads stay in memory; the paper also rounds them to 4 bits.

    Attributes:
      gates, sparsity, sinks, recent: as in `DuoAttention`.
      budget: tokens of the pages that are chosen, a multiple of `page`.
      page: tokens in a physical page, a multiple of `logical`.
      logical: tokens in a logical page.
      reuse: steps for which a choice holds.
    """

    budget: int = 4096
    page: int = 64
    logical: int = 16
    reuse: int = 4
    compresses = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.page % self.logical or self.budget % self.page:
            raise ValueError(
                f"budget={self.budget} of the cache 'lserve' with page={self.page} and logical={self.logical}; expected a multiple of the "
                "page, and pages that are a multiple of logical ones"
            )

    def check(self, total: int, layers: Any) -> None:
        super().check(total, layers)
        super(DuoAttention, self).check(total, layers)

    def compressed(
        self, prompts: Sequence[TwoKinds], views: Sequence[View], *, room: int, call: int = 1, **_: Any
    ) -> list[CacheState]:
        found = []
        for prompt in prompts:
            if not prompt.everywhere:
                found.append(prompt)
                continue
            keys = prompt.whole.entries[0]
            whole = Prompt.empty(self, prompt.whole, keys.shape[2])
            chosen = jnp.zeros(keys.shape[:3], bool)
            found.append(dataclasses.replace(prompt, whole=everything(whole, room, extra={"chosen": chosen})))
        return found

    def adjusted(
        self, kept: Kept, view: View, q: Float[Array, "b t h k"], bias: Float[Array, "b h t n"]
    ) -> Float[Array, "b h t n"]:
        chosen, always = self.choices(kept, q, bias)
        return jnp.where(to_heads(chosen, q.shape[2]) | always[:, None], bias, -jnp.inf)

    def evicted(
        self,
        kept: Kept,
        view: View,
        q: Float[Array, "b t h k"],
        bias: Float[Array, "b h t n"],
        visit: Visit,
    ) -> Kept:
        # Nothing is evicted: the choice of the last query is kept.
        seen = view.bias(visit.numbers, visit.positions, kept.numbers, kept.positions)
        chosen, _ = self.choices(kept, q, seen)
        return dataclasses.replace(kept, extra={"chosen": jnp.moveaxis(chosen[:, :, -1], 1, 2)})

    def choices(
        self, kept: Kept, q: Float[Array, "b t h k"], bias: Float[Array, "b h t n"]
    ) -> tuple[Bool[Array, "b g t n"], Bool[Array, "b t n"]]:
        """Returns the tokens of the pages that key/value heads choose for each query, and those that are read in any case."""
        seen, positions, last = places(kept, bias)
        always = (positions < self.sinks) | (positions > last - self.recent)
        always |= positions // self.page == last // self.page
        numbers, n = kept.numbers[:, :, 0], kept.slots
        pages = block_index(numbers, positions[:, 0] // self.page)
        likes = self.likes(kept, q)  # b g t n, of the logical page of each token
        # A page is chosen among those with a token that the query sees and would not read otherwise.
        likes = jnp.where((seen & ~always)[:, None], likes, -jnp.inf)
        of_pages = jax.vmap(lambda x, index: jax.ops.segment_max(x, index, n + 1))(
            jnp.moveaxis(likes, 3, 1), pages
        )
        of_pages = jnp.moveaxis(of_pages, 1, 3)[..., :n]
        best = among_best(of_pages, self.budget // self.page)
        index = jnp.broadcast_to(jnp.minimum(pages, n - 1)[:, None, None], likes.shape)
        now = jnp.take_along_axis(best, index, axis=3)
        again = ((last[..., 0] - kept.begun[:, None]) % self.reuse == 0) & (last[..., 0] >= 0)
        index = jax.lax.cummax(jnp.where(again, jnp.arange(again.shape[1]), -1), axis=1)[:, None, :, None]
        before = jnp.moveaxis(kept.extra["chosen"], 2, 1)[:, :, None]
        return jnp.where(index >= 0, jnp.take_along_axis(now, jnp.maximum(index, 0), axis=2), before), always

    def likes(self, kept: Kept, q: Float[Array, "b t h k"]) -> Float[Array, "b g t n"]:
        """Returns S of the logical page of each token, the largest over the query heads of each key/value head."""
        (b, t, h, width), (n, groups) = q.shape, kept.keys.shape[1:3]
        keys, numbers = kept.keys.astype(jnp.float32), kept.numbers[:, :, 0]
        pages = block_index(numbers, kept.positions[:, :, 0] // self.logical)

        def bound(reduce, x):
            x = jax.vmap(lambda x, index: reduce(x, index, n + 1))(x, pages)
            return jnp.where(jnp.isfinite(x), x, 0.0)

        q = q.astype(jnp.float32).reshape(b, t, groups, h // groups, width)
        high, low = bound(jax.ops.segment_max, keys), bound(jax.ops.segment_min, keys)
        # max(q a, q b) with a >= b is q+ a - q- b.
        likes = sum(
            jnp.einsum("btgrk,bpgk->bgrtp", part, x, precision=jax.lax.Precision.HIGHEST)
            for part, x in ((jnp.maximum(q, 0), high), (jnp.minimum(q, 0), low))
        ).max(2)
        index = jnp.broadcast_to(pages[:, None, None], (b, groups, t, n))
        return jnp.take_along_axis(likes, index, axis=3)
