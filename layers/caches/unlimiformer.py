"""Unlimiformer: each head retrieves the keys of the prompt that it likes best (Bertsch et al. 2023, arXiv:2305.01625)."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from layers.caches.kept import Kept
from layers.caches.prompt import Prompt
from layers.caches.selecting import Selecting, among_best, everything
from layers.caches.state import CacheState, View
from layers.options import checked_dataclass
from layers.typing import Array, Bool, Float


@checked_dataclass
class Unlimiformer(Selecting):
    """Unlimiformer: each head retrieves the keys of the prompt that it likes best (Bertsch et al. 2023, arXiv:2305.01625).

        query i of a new token reads   the `budget` tokens j of the prompt of largest q_i . k_j,   and all new tokens up to i

    per query head, so that heads of one key/value head retrieve different tokens. The paper's decoder retrieves states of an encoder, which
    reads a long input in overlapping pieces; here the prompt is read as a whole, and positions are true ones. The search is exact, and
    all keys stay in memory.

    Attributes:
      budget: tokens of the prompt that a query head reads.
    """

    budget: int = 1024

    def compressed(
        self, prompts: Sequence[Prompt], views: Sequence[View], *, room: int, call: int = 1, **_: Any
    ) -> list[CacheState]:
        # New tokens are not old.
        return [
            everything(prompt, room, extra={"old": jnp.ones(prompt.keys.shape[:3], bool)})
            for prompt in prompts
        ]

    def read(
        self, kept: Kept, view: View, q: Float[Array, "b t h k"], bias: Float[Array, "b h t n"]
    ) -> Bool[Array, "b #h t n"]:
        old = kept.extra["old"][:, None, None, :, 0]
        likes = jnp.where(old, view.products(q, kept.keys, bias), -jnp.inf)
        return ~old | among_best(likes, self.budget)
