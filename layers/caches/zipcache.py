"""ZipCache: more bits for tokens that receive much attention (He et al. 2024, arXiv:2405.14256)."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from layers.caches.kept import by_group, keep
from layers.caches.parted import Parted, RoundedTokens
from layers.caches.policy import CachePolicy
from layers.caches.prompt import Prompt
from layers.caches.state import CacheState, View
from layers.options import Count, UnitInterval, checked_dataclass
from layers.parts.cache import Cache
from layers.segments import Visit
from layers.typing import Array, Bool, Float, Int

Bits = Literal[2, 4, 8]


@checked_dataclass
class ZipCache(CachePolicy):
    """ZipCache: more bits for tokens that receive much attention from probes (He et al. 2024, arXiv:2405.14256).

        s_j = sum_{i in probes} p_ij / |{i in probes: i >= j}|

    per key/value head, the mean over its query heads; probes are the last `window` queries and others at random. The floor(salient t)
    tokens of largest s have `high` bits, the others of the prompt `low` bits. Keys are rounded by channel over all tokens of a part,
    values by token after division by sqrt(max_j |v_jc|) per channel. New tokens stay as they are.

    Attributes:
      salient: share of the tokens with more bits.
      high, low: bits of the two parts.
      window: number of last queries among the probes.
      random: share of the other queries among them.
      seed: seed of the choice, which depends on the position alone.
    """

    salient: UnitInterval = 0.4
    high: Bits = 4
    low: Bits = 2
    window: int = 64
    random: UnitInterval = 0.05
    seed: Count = 0

    @property
    def observed(self) -> int:
        return self.window

    def check(self, total: int, layers: Mapping[int, Any]) -> None:
        check_bytes("zipcache", (self.high, self.low), layers)

    def probes(self, positions: Int[Array, "b t"]) -> Bool[Array, "b t"]:
        """Returns which queries are probes by chance."""
        keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (None, 0))(
            jax.random.key(self.seed), positions
        )
        return jax.vmap(jax.vmap(jax.random.uniform))(keys) < self.random

    def first_scores(self, cache: Cache, heads: int) -> Any:
        places = cache.numbers.shape
        return jnp.zeros((*places, heads), jnp.float32), jnp.zeros(places, jnp.float32)

    def scored(self, scores: Any, view: View, q: Array, cache: Cache, visit: Visit) -> Any:
        mass, count = scores
        probes = self.probes(visit.positions) & (visit.numbers != 0)
        sees = (cache.numbers[:, None] == visit.numbers[..., None]) & probes[..., None]
        sees &= cache.positions[:, None] <= visit.positions[..., None]
        return mass + view.mass(q, cache, visit, probes), count + sees.sum(1)

    def saliency(self, prompt: Prompt, view: View) -> Float[Array, "b s g"]:
        """Returns s."""
        mass, count = prompt.scores
        last = (prompt.query_numbers != 0) & ~self.probes(prompt.query_positions)
        sees = last[..., None] & (prompt.cache.positions[:, None] <= prompt.query_positions[..., None])
        weights = jnp.where(last[:, None, :, None], prompt.observed(view), 0.0).sum(2)
        total = jnp.moveaxis(mass, 2, 1) + weights
        count += sees.sum(1).astype(jnp.float32)
        found = by_group(total / jnp.maximum(count, 1.0)[:, None], prompt.keys.shape[2])
        return jnp.moveaxis(found, 1, 2)

    def compressed(
        self, prompts: Sequence[Prompt], views: Sequence[View], *, room: int, call: int = 1, **_: Any
    ) -> list[CacheState]:
        found = []
        for prompt, view in zip(prompts, views, strict=True):
            salient = jnp.floor(self.salient * prompt.length.astype(jnp.float32) + 1e-3).astype(jnp.int32)[
                :, None
            ]
            s, count = self.saliency(prompt, view), min(prompt.slots, int(self.salient * prompt.slots) + 1)
            most = keep(prompt, s, count, 0, budgets=salient)
            rest = keep(prompt, -s, prompt.slots, 0, budgets=prompt.length[:, None] - salient)
            top = (
                jnp.abs(jnp.where(prompt.live[..., None, None], prompt.values, 0))
                .astype(jnp.float32)
                .max(1, keepdims=True)
            )
            factors = jax.lax.rsqrt(jnp.where(top > 0, top, 1.0))
            old = tuple(
                RoundedTokens.of(
                    part,
                    bits,
                    key_axis=1,
                    key_factors=jnp.ones_like(prompt.keys[:, :1], jnp.float32),
                    value_factors=factors,
                )
                for part, bits in ((most, self.high), (rest, self.low))
            )
            found.append(Parted(old, keep(prompt, s, 0, room)))
        return found


def check_bytes(name: str, bits: Sequence[int], layers: Mapping[int, Any]) -> None:
    """Raises ValueError unless the numbers of a head fill whole bytes."""
    for layer, config in layers.items():
        if config.size % (8 // min(bits)):
            raise ValueError(
                f"head_dim={config.size} of layer {layer} does not fit the cache {name!r} with {min(bits)} bits; expected a multiple "
                f"of {8 // min(bits)}, or more bits"
            )
