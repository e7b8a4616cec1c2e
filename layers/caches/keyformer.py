"""Keyformer: key tokens by noisy attention whose temperature grows (Adnan et al. 2024, arXiv:2403.09054)."""

from typing import Any

import jax
import jax.numpy as jnp

from layers.caches.h2o import H2O
from layers.caches.kept import Kept
from layers.caches.state import View, softmax
from layers.options import Count, NonNegative, Positive, checked_dataclass
from layers.parts.cache import Cache
from layers.segments import Visit
from layers.typing import Array, Float, Int


@checked_dataclass
class Keyformer(H2O):
    """Keyformer: key tokens by noisy attention, and the last tokens (Adnan et al. 2024, arXiv:2403.09054).

        s_j = sum_{i <= t} softmax_j((a_ij + noise z_ij) / tau_i),   z_ij ~ Gumbel,   tau_i = tau + growth max(0, i - t_0 + 1)

    with a_ij the logits and t_0 the number of tokens of the prompt. Kept as in `H2O`: the last `recent` tokens and, of the others,
    those of largest s. The noise of a query, a key and a head depends on the seed, the row and the positions alone, and is the same
    in all layers.

    Attributes:
      budget, recent: as in `H2O`; the authors take 60% of the prompt, and 30% of that.
      tau: temperature of the prompt.
      growth: what each new token adds to it.
      noise: factor of the noise; the authors' is 1.
      seed: seed of the noise.
    """

    tau: Positive = 1.0
    growth: NonNegative = 0.01
    noise: NonNegative = 1.0
    seed: Count = 0

    def scored(self, scores: Any, view: View, q: Array, cache: Cache, visit: Visit) -> Any:
        numbers, positions = (
            jnp.broadcast_to(x[..., None], cache.entries[0].shape[:3])
            for x in (cache.numbers, cache.positions)
        )
        bias = view.bias(visit.numbers, visit.positions, numbers, positions)
        logits = self._noisy(view.products(q, cache.entries[0], bias), visit.positions, positions)
        return scores + jnp.moveaxis(softmax(logits / self.tau).sum(2), 1, 2)

    def received(
        self,
        kept: Kept,
        view: View,
        q: Float[Array, "b t h k"],
        bias: Float[Array, "b h t n"],
        visit: Visit,
    ) -> Float[Array, "b h n"]:
        logits = self._noisy(view.products(q, kept.keys, bias), visit.positions, kept.positions)
        new = jnp.maximum(visit.positions - kept.begun[:, None] + 1, 0)
        return softmax(logits / (self.tau + self.growth * new)[:, None, :, None]).sum(2)

    def _noisy(self, logits, q_positions, positions):
        if not self.noise:
            return logits
        return logits + self.noise * gumbel(self.seed, q_positions, positions, logits.shape[1])


def gumbel(
    seed: int, q_positions: Int[Array, "b t"], positions: Int[Array, "b n g"], heads: int
) -> Float[Array, "b h t n"]:
    """Returns standard Gumbel noise for each row, head, query and key, which depends on nothing but these and the seed."""
    rows, groups = positions.shape[0], positions.shape[2]
    fold = jax.random.fold_in
    of_rows = jax.vmap(fold, (None, 0))(jax.random.key(seed), jnp.arange(rows))
    of_queries = jax.vmap(jax.vmap(fold, (None, 0)))(of_rows, q_positions)  # b t

    def of_head(head):
        """Noise of one query head for all queries and keys."""
        keys = jax.vmap(jax.vmap(fold, (0, None)), (0, None))(of_queries, head)
        pairs = jax.vmap(jax.vmap(jax.vmap(fold, (None, 0)), (0, None)))(
            keys, positions[:, :, head // (heads // groups)]
        )
        return jax.vmap(jax.vmap(jax.vmap(jax.random.gumbel)))(pairs)

    return jnp.moveaxis(jax.vmap(of_head)(jnp.arange(heads)), 0, 1)
