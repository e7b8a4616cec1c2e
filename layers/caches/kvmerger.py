"""KVMerger: neighbours with similar keys become one (Wang et al. 2024, arXiv:2407.08454)."""

from collections.abc import Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from layers.caches.h2o import H2O
from layers.caches.kept import Kept, by_group
from layers.caches.policy import CachePolicy
from layers.caches.prompt import Prompt
from layers.caches.state import CacheState, View
from layers.options import Bound, Count, checked_dataclass
from layers.typing import Array, Float, Int

Similarity = Annotated[float, Bound(least=-1, most=1)]


@checked_dataclass
class KVMerger(CachePolicy):
    """KVMerger: neighbours whose keys are similar become one entry (Wang et al. 2024, arXiv:2407.08454).

        set:    a run of tokens with cos(k_j, k_{j-1}) > threshold;   pivot p: its token that received most attention
        w_i = exp(-|k_p - k_i|^2 / (2 sigma^2)),   sigma = mean_i |k_p - k_i| over the set
        k = sum_i w_i k_i / sum_i w_i,   v alike,   logit + log |set|

    per key/value head, at the end of the prompt, but for its last `recent` tokens. An entry has the position of its pivot. The last term
    lets it receive what its tokens would; without it merged tokens count once. Keys are rotated, which long runs blur.

    Attributes:
      threshold: cosine above which neighbours are joined.
      recent: number of last tokens that stay as they are.
      counted: whether the logarithm of the size is added.
    """

    threshold: Similarity = 0.75
    recent: Count = 32
    counted: bool = True

    first_scores = H2O.first_scores
    scored = H2O.scored

    def sets(self, prompt: Prompt) -> Int[Array, "b s g"]:
        """Returns the number of each token's set, from 0; that of dead slots is beyond all."""
        keys = prompt.keys.astype(jnp.float32)
        norm = jnp.sqrt(jnp.square(keys).sum(3))
        product = (keys[:, 1:] * keys[:, :-1]).sum(3)
        similar = product > self.threshold * norm[:, 1:] * norm[:, :-1]
        similar = jnp.pad(similar, ((0, 0), (1, 0), (0, 0)))
        live = prompt.live
        old = live & ~prompt.recent(self.recent)
        joined = similar & (old & jnp.pad(live, ((0, 0), (1, 0)))[:, :-1])[..., None]
        number = jnp.cumsum(live[..., None] & ~joined, axis=1, dtype=jnp.int32) - 1
        return jnp.where(live[..., None], number, prompt.slots)

    def budgets(self, prompts: Sequence[Prompt], views: Sequence[View]) -> list[Int[Array, "b g"]]:
        found = []
        for prompt in prompts:
            number = self.sets(prompt)
            found.append(jnp.where(number < prompt.slots, number + 1, 0).max(1))
        return found

    def compressed(
        self,
        prompts: Sequence[Prompt],
        views: Sequence[View],
        *,
        room: int,
        call: int = 1,
        counts: Sequence[int] | None = None,
        **_: Any,
    ) -> list[CacheState]:
        counts = [prompt.slots for prompt in prompts] if counts is None else counts
        return [self._merged(prompt, count, room) for prompt, count in zip(prompts, counts, strict=True)]

    def _merged(self, prompt, count, room):
        """Returns the entries of a prompt, and slots for new tokens."""
        mass = by_group(prompt.scores, prompt.keys.shape[2], axis=2)
        per_head = jax.vmap(jax.vmap(merge, (1, 1, 1, 1, None), 1), (0, 0, 0, 0, None))
        keys, values, sizes, pivots = per_head(prompt.keys, prompt.values, mass, self.sets(prompt), count)
        positions = jnp.take_along_axis(prompt.cache.positions[..., None], jnp.maximum(pivots, 0), axis=1)
        number = prompt.cache.numbers.max(1)[:, None, None]

        def padded(x):
            return jnp.pad(x, [(0, room if axis == 1 else 0) for axis in range(x.ndim)])

        there = sizes > 0
        return Kept(
            padded(keys.astype(prompt.keys.dtype)),
            padded(values.astype(prompt.values.dtype)),
            padded(jnp.where(there, number, 0)),
            padded(jnp.where(there, positions, 0)),
            {"log_size": padded(jnp.log(jnp.maximum(sizes, 1).astype(jnp.float32)))},
            prompt.length,
            self,
        )

    def adjusted(
        self, kept: Kept, view: View, q: Float[Array, "b t h k"], bias: Float[Array, "b h t n"]
    ) -> Float[Array, "b h t n"]:
        if not self.counted:
            return bias
        each = bias.shape[1] // kept.keys.shape[2]
        return bias + jnp.repeat(jnp.moveaxis(kept.extra["log_size"], 2, 1), each, axis=1)[:, :, None]


def merge(
    keys: Float[Array, "s k"],
    values: Float[Array, "s v"],
    mass: Float[Array, "s"],
    number: Int[Array, "s"],
    count: int,
) -> tuple[Float[Array, "n k"], Float[Array, "n v"], Int[Array, "n"], Int[Array, "n"]]:
    """Returns the merged keys and values of `count` sets, their sizes and pivots, given the set of each token."""
    index = jnp.arange(len(number), dtype=jnp.int32)
    own = jnp.minimum(number, count - 1)

    def total(x):
        return jax.ops.segment_sum(x, number, count)

    top = jax.ops.segment_max(mass, number, count)
    pivots = jax.ops.segment_min(jnp.where(mass == top[own], index, len(number)), number, count)
    pivots = jnp.minimum(pivots, len(number) - 1)
    keys, values = keys.astype(jnp.float32), values.astype(jnp.float32)
    distance = jnp.sqrt(jnp.square(keys - keys[pivots][own]).sum(1))
    sizes = total(jnp.ones_like(index))
    sigma = (total(distance) / jnp.maximum(sizes, 1).astype(jnp.float32))[own]
    w = jnp.exp(-jnp.square(distance / jnp.where(sigma > 0, sigma, 1.0)) / 2)
    weight = jnp.maximum(total(w), 1e-30)[:, None]
    return total(w[:, None] * keys) / weight, total(w[:, None] * values) / weight, sizes, pivots
