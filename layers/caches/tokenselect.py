"""TokenSelect: new tokens read the tokens that most heads vote for (Wu et al. 2024, arXiv:2411.02886)."""

import jax.numpy as jnp

from layers.caches.kept import Kept
from layers.caches.selecting import Selecting, among_best, places
from layers.caches.state import View, softmax
from layers.options import Count, checked_dataclass
from layers.typing import Array, Bool, Float


@checked_dataclass
class TokenSelect(Selecting):
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

    def read(
        self, kept: Kept, view: View, q: Float[Array, "b t h k"], bias: Float[Array, "b h t n"]
    ) -> Bool[Array, "b #h t n"]:
        seen, positions, last = places(kept, bias)
        always = (positions < self.sinks) | (positions > last - self.recent)
        votes = softmax(view.products(q, kept.keys, bias)).sum(1)
        return (always | among_best(jnp.where(seen & ~always, votes, -jnp.inf), self.budget))[:, None]
