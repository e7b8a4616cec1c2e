"""ThinK: keys without the channels that queries read least (Xu et al. 2024, arXiv:2407.21018)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from layers.caches.kept import keep
from layers.caches.parted import FewChannels, Parted
from layers.caches.policy import CachePolicy
from layers.caches.prompt import Prompt
from layers.caches.state import CacheState, View
from layers.options import Fraction, checked_dataclass
from layers.typing import Array, Int


@checked_dataclass
class ThinK(CachePolicy):
    """ThinK: keys without the channels that queries read least (Xu et al. 2024, arXiv:2407.21018).

        s_c = mean_{i > t - window} q_ic^2  mean_j k_jc^2,    q_i . k_j ~ sum_{c kept} q_ic k_jc

    per key/value head, the mean over its query heads: up to a factor the squared Frobenius norm of q_c k_c^T. The floor(ratio k) channels
    of smallest s are left out of the keys of the prompt but for its last `recent` tokens. These, new tokens and all values stay whole.

    Attributes:
      ratio: share of the channels that are left out.
      window: number of last queries.
      recent: number of last tokens whose keys stay whole.
    """

    ratio: Fraction = 0.4
    window: int = 32
    recent: int = 128

    @property
    def observed(self) -> int:
        return self.window

    def compressed(
        self, prompts: Sequence[Prompt], views: Sequence[View], *, room: int, call: int = 1, **_: Any
    ) -> list[CacheState]:
        found = []
        for prompt in prompts:
            every = jnp.zeros(prompt.keys.shape[:3])
            recent = prompt.recent(self.recent)[..., None]
            old = keep(prompt, jnp.where(recent, -jnp.inf, every), prompt.slots, 0)
            last = keep(prompt, jnp.where(recent, every, -jnp.inf), self.recent, room)
            found.append(Parted((FewChannels.of(old, self.channels(prompt)),), last))
        return found

    def channels(self, prompt: Prompt) -> Int[Array, "b g c"]:
        """Returns the channels that stay, in order."""
        groups, width = prompt.keys.shape[2:]
        queries, keys = (x.astype(jnp.float32) for x in (prompt.queries, prompt.keys))
        there = (prompt.query_numbers != 0)[..., None, None]
        read = (
            jnp.where(there, jnp.square(queries), 0.0)
            .sum(1)
            .reshape(-1, groups, queries.shape[2] // groups, width)
        )
        size = jnp.where(prompt.live[..., None, None], jnp.square(keys), 0.0).sum(1)
        _, index = jax.lax.top_k(read.mean(2) * size, width - int(self.ratio * width))
        return jnp.sort(index, axis=2)
