"""StreamingLLM and LM-Infinite: the first tokens and the last ones (arXiv:2309.17453, arXiv:2308.16137)."""

import dataclasses
from functools import partial
from typing import Any, Literal

import jax

from layers.caches.policy import CachePolicy
from layers.caches.state import CacheState, View
from layers.kernels.attention import Mask, Tokens
from layers.options import Count, checked_dataclass
from layers.parts.cache import Cache, empty_cache, extend
from layers.parts.relative_attention import relative_attention
from layers.parts.streaming_attention import streaming_attention
from layers.positions import Rotary
from layers.segments import Visit
from layers.typing import Array, Float


@checked_dataclass
class Streaming(CachePolicy):
    """StreamingLLM: the first tokens and the last ones, at distances inside the cache (Xiao et al. 2023, arXiv:2309.17453).

        query i sees   j < sinks   and   i - window < j <= i,    window = budget - sinks

    of its prompt and of new tokens alike, so that prompts of any length are read with `budget` slots. Keys are cached rotated. With
    distance="cache" the distance to a sink is at most budget - 1, which is what re-indexing positions inside the cache gives:
    queries are rotated back for the sinks. With distance="window" all sinks beyond the window are at the distance `window`, which is
    LM-Infinite (Han et al. 2023, arXiv:2308.16137; it has 10 to 100 sinks and the length of training as window). What leaves the
    window is lost.

    Attributes:
      budget: slots per layer, the sinks included.
      sinks: number of first tokens that are kept.
      distance: "cache", "window", or "true" for distances as they are. Positions that are not rotary keep theirs.
    """

    budget: int = 1024
    sinks: Count = 4
    distance: Literal["cache", "window", "true"] = "cache"
    compresses = False

    def __post_init__(self) -> None:
        if self.budget <= self.sinks:
            raise ValueError(
                f"budget={self.budget} of the cache 'streaming' with sinks={self.sinks}; expected more than the sinks, so that "
                "there is a window"
            )

    @property
    def window(self) -> int:
        """Number of last tokens."""
        return self.budget - self.sinks

    def begin(self, cache: Cache, heads: int, place: int) -> CacheState:
        return Stream(self.ring(cache), self)

    def ring(self, cache: Cache) -> Cache:
        """Returns an empty cache of the budget's slots, like another one."""
        shapes = tuple(entry.shape[2:] for entry in cache.entries)
        return empty_cache(
            *("streaming", cache.length.shape[0], shapes, cache.entries[0].dtype),
            max_length=None,
            window=self.window,
            sinks=self.sinks,
        )


@partial(jax.tree_util.register_dataclass, data_fields=["cache"], meta_fields=["policy"])
@dataclasses.dataclass(frozen=True)
class Stream(CacheState):
    """The first and the last tokens of each row."""

    cache: Any
    policy: Streaming

    @property
    def slots(self) -> int:
        return self.policy.budget

    def like(self, cache: Cache) -> "Stream":
        return dataclasses.replace(self, cache=self.policy.ring(cache))

    def attend(
        self,
        view: View,
        q: Float[Array, "b t h k"],
        k: Float[Array, "b t g k"],
        v: Float[Array, "b t g v"],
        visit: Visit,
    ) -> tuple[Float[Array, "b t h v"], "Stream"]:
        policy = self.policy
        cache, seen, _ = extend(self.cache, (k, v), visit, window=policy.window, sinks=policy.sinks)
        attend = relative_attention
        if policy.distance != "true" and policy.sinks and isinstance(view.position.config, Rotary):
            attend = partial(streaming_attention, distance=policy.distance)
        o = attend(
            *(view.position, q, *seen.entries),
            causal=True,
            mask=Mask(window=policy.window, sink_tokens=policy.sinks),
            logits=view.logits,
            segment_ids=visit.numbers,
            tokens=Tokens(seen.numbers, visit.positions, seen.positions),
            scale=view.scale,
        )
        return o, dataclasses.replace(self, cache=cache)
