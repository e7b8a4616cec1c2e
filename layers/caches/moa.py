"""MoA: each head sees the first tokens and a span of the last ones, which grows in its own way (Fu et al. 2024, arXiv:2406.14909)."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.caches.by_head import check_heads, read_heads
from layers.caches.kept import Kept, keep
from layers.caches.policy import CachePolicy
from layers.caches.prompt import Prompt
from layers.caches.selecting import to_heads
from layers.caches.state import CacheState, View
from layers.kernels.attention import attention
from layers.options import Count, checked_dataclass
from layers.parts.cache import Cache, extend
from layers.segments import Visit
from layers.typing import Array, Float


@checked_dataclass
class MoA(CachePolicy):
    """MoA: each head sees the first tokens and an elastic span of the last ones (Fu et al. 2024, arXiv:2406.14909).

        n_g(N) = max(least, floor(alpha_g + beta_g N))
        query i sees   j < sinks   or   i - (n_g(N) - sinks) < j <= i

    per key/value head g. N is the number of tokens of the row up to the query in a prompt, which can so be read in any number of calls,
    and that of the prompt and the most new tokens afterwards. Heads of beta 0 have a fixed window, those of alpha 0 and beta 1 see everything. What
    leaves a span after the prompt is evicted; slots are those of the layer's largest span. The paper has spans of query heads.
    `seqmodels.spans.search` finds alpha and beta by the influence of what is hidden on the loss.

    Attributes:
      alphas, betas: a number per layer with a cache and key/value head, in order, found for the model; JSON files or nested lists.
      sinks: first tokens that all heads see.
      least: tokens of the smallest span, the sinks included.
    """

    alphas: Any = None
    betas: Any = None
    sinks: Count = 64
    least: int = 128

    def __post_init__(self) -> None:
        for name in ("alphas", "betas"):
            given = getattr(self, name)
            if given is None:
                raise ValueError(
                    f"{name}=None of the cache 'moa', which needs the span of every head, found for the model; expected a list per layer, "
                    "or a JSON file of one"
                )
            object.__setattr__(self, name, read_heads(name, given, least=None))
        if [*map(len, self.alphas)] != [*map(len, self.betas)]:
            raise ValueError(
                "alphas and betas of the cache 'moa' are of different heads; expected one of each per head"
            )
        if self.least <= self.sinks:
            raise ValueError(
                f"least={self.least} of the cache 'moa' with sinks={self.sinks}; expected more than the sinks, so that there is a span"
            )

    def check(self, total: int, layers: Mapping[int, Any]) -> None:
        for name in ("alphas", "betas"):
            check_heads(name, getattr(self, name), layers)

    def spans(self, place: int, longest: int) -> np.ndarray:
        """Returns n of the heads of a layer for all N up to `longest`, int32 (longest + 1, g)."""
        alpha, beta = np.asarray(self.alphas[place]), np.asarray(self.betas[place])
        spans = np.floor(alpha + beta * np.arange(longest + 1)[:, None])
        return np.clip(spans, self.least, max(self.least, longest)).astype(np.int32)

    def begin(self, cache: Cache, heads: int, place: int) -> CacheState:
        return dataclasses.replace(Spanned.empty(self, cache, heads), place=place)

    def compressed(
        self, prompts: Sequence[Prompt], views: Sequence[View], *, room: int, call: int = 1, **_: Any
    ) -> list[CacheState]:
        found = []
        for prompt in prompts:
            spans = self.spans(prompt.place, prompt.slots + room)
            own = jnp.asarray(spans)[prompt.length + room]
            most = int(spans.max())
            positions = prompt.cache.positions
            scores = jnp.where(positions < self.sinks, jnp.inf, positions.astype(jnp.float32))
            scores = jnp.broadcast_to(scores[..., None], prompt.keys.shape[:3])
            # A slot beyond the span is free again before the next call.
            slots = min(room, call + max(0, most - prompt.slots))
            found.append(keep(prompt, scores, most, slots, budgets=own, held={"span": own}))
        return found

    def adjusted(
        self, kept: Kept, view: View, q: Float[Array, "b t h k"], bias: Float[Array, "b h t n"]
    ) -> Float[Array, "b h t n"]:
        heads = q.shape[2]
        positions = to_heads(jnp.moveaxis(kept.positions, 2, 1), heads)[:, :, None]
        now = jnp.where(bias > -jnp.inf, positions, -1).max(3, keepdims=True)
        span = to_heads(kept.held["span"], heads)[..., None, None]
        return jnp.where((positions < self.sinks) | (now - positions < span - self.sinks), bias, -jnp.inf)

    def evicted(
        self,
        kept: Kept,
        view: View,
        q: Float[Array, "b t h k"],
        bias: Float[Array, "b h t n"],
        visit: Visit,
    ) -> Kept:
        number, count = (x[:, None, None] for x in (visit.place.number, visit.place.position))
        # Tokens that the next query sees.
        last = count - kept.held["span"][:, None] + self.sinks
        near = (kept.positions < self.sinks) | (kept.positions > last)
        return kept.only((kept.numbers == number) & near)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["cache", "queries", "query_numbers", "query_positions", "scores"],
    meta_fields=["policy", "place"],
)
@dataclasses.dataclass(frozen=True)
class Spanned(Prompt):
    """A prompt whose heads see a part of it.

    Attributes:
      place: number of the layer among those with a cache.
    """

    place: int = 0

    def like(self, cache: Cache) -> "Spanned":
        return dataclasses.replace(super().like(cache), place=self.place)

    def attend(
        self,
        view: View,
        q: Float[Array, "b t h k"],
        k: Float[Array, "b t g k"],
        v: Float[Array, "b t g v"],
        visit: Visit,
    ) -> tuple[Float[Array, "b t h v"], "Spanned"]:
        cache, seen, beyond = extend(self.cache, (k, v), visit)
        held = cache.numbers[..., None], cache.positions[..., None]
        bias = view.bias(visit.numbers, visit.positions, *held)
        spans = jnp.asarray(self.policy.spans(self.place, self.slots))
        own = jnp.moveaxis(spans[jnp.minimum(visit.positions + 1, self.slots)], 2, 1)[..., None]
        distance = (visit.positions[..., None] - cache.positions[:, None])[:, None]
        near = (distance < own - self.policy.sinks) | (cache.positions < self.policy.sinks)[:, None, None]
        logits = dataclasses.replace(view.logits, bias=jnp.where(to_heads(near, q.shape[2]), bias, -jnp.inf))
        o = attention(q, *seen.entries, logits=logits, scale=view.scale)
        return jnp.where(beyond[..., None, None], jnp.nan, o), dataclasses.replace(self, cache=cache)
