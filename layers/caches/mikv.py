"""MiKV: what would be evicted stays with few bits (Yang et al. 2024, arXiv:2402.18096)."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from layers.caches.kept import by_group, keep
from layers.caches.parted import Parted, RoundedTokens
from layers.caches.policy import CachePolicy
from layers.caches.prompt import Prompt
from layers.caches.state import CacheState, View
from layers.caches.zipcache import Bits, check_bytes
from layers.options import checked_dataclass
from layers.parts.cache import Cache
from layers.segments import Visit
from layers.typing import Array


@checked_dataclass
class MiKV(CachePolicy):
    """MiKV: what `H2O` would evict of a prompt stays with few bits (Yang et al. 2024, arXiv:2402.18096).

        c = sqrt(max_i |q_ic| / max_j |k_jc|)    per channel,    q_i . k_j ~ (q_i / c) . round(c k_j)

    The budget tokens that received most attention per key/value head stay as they are. Of the others keys and values are rounded by
    token, with keys balanced by c so that channels of large keys do not take all steps. New tokens stay as they are.

    Attributes:
      budget: tokens that each head keeps as they are.
      bits: bits of the others.
    """

    budget: int = 1024
    bits: Bits = 4

    def check(self, total: int, layers: Mapping[int, Any]) -> None:
        super().check(total, layers)
        check_bytes("mikv", (self.bits,), layers)

    def first_scores(self, cache: Cache, heads: int) -> Any:
        (b, slots), width = cache.numbers.shape, cache.entries[0].shape[3]
        return jnp.zeros((b, slots, heads), jnp.float32), jnp.zeros((b, heads, width), jnp.float32)

    def scored(self, scores: Any, view: View, q: Array, cache: Cache, visit: Visit) -> Any:
        mass, top = scores
        real = (visit.numbers != 0)[..., None, None]
        largest = jnp.where(real, jnp.abs(q.astype(jnp.float32)), 0.0).max(1)
        return mass + view.mass(q, cache, visit), jnp.maximum(top, largest)

    def compressed(
        self, prompts: Sequence[Prompt], views: Sequence[View], *, room: int, call: int = 1, **_: Any
    ) -> list[CacheState]:
        found = []
        for prompt in prompts:
            groups, (mass, top) = prompt.keys.shape[2], prompt.scores
            s = by_group(mass, groups, axis=2)
            kept = keep(prompt, s, self.budget, room)
            rest = keep(
                prompt, -s, prompt.slots, 0, budgets=jnp.maximum(prompt.length - self.budget, 0)[:, None]
            )
            top = top.reshape(len(top), groups, -1, top.shape[2]).max(2)[:, None]
            keys = jnp.where(prompt.live[..., None, None], jnp.abs(prompt.keys.astype(jnp.float32)), 0.0)
            keys = keys.max(1, keepdims=True)
            balance = jnp.sqrt(jnp.where((top > 0) & (keys > 0), top / jnp.where(keys > 0, keys, 1.0), 1.0))
            ones = jnp.ones_like(prompt.values[:, :1], jnp.float32)
            rounded = RoundedTokens.of(rest, self.bits, key_axis=3, key_factors=balance, value_factors=ones)
            found.append(Parted((rounded,), kept))
        return found
