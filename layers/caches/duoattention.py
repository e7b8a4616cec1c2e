"""DuoAttention: some heads see all tokens, the others the first and the last ones (Xiao et al. 2024, arXiv:2410.10819)."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.caches.by_head import check_heads, read_heads
from layers.caches.policy import CachePolicy
from layers.caches.state import CacheState, View
from layers.kernels.attention import Mask, Tokens
from layers.options import Count, UnitInterval, checked_dataclass
from layers.parts.cache import Cache, empty_cache, extend
from layers.parts.relative_attention import relative_attention
from layers.positions import Position
from layers.segments import Visit
from layers.typing import Array, Float, Int


@checked_dataclass
class DuoAttention(CachePolicy):
    """DuoAttention: retrieval heads see all tokens, streaming heads the first and last (Xiao et al. 2024, arXiv:2410.10819).

        retrieval heads, whose gate is at least the quantile `sparsity` of all gates:    j <= i
        streaming heads:                                     j < sinks   or   i - recent < j <= i

    per key/value head, in prompts and new tokens alike. Streaming heads hold sinks + recent tokens, whatever the length of the row.

    Attributes:
      gates: a number from 0 to 1 per layer with a cache and key/value head, in order, trained for the model; a JSON file or nested
        lists.
      sparsity: share of the heads that are streaming heads.
      sinks, recent: first and last tokens that these see.
    """

    gates: Any = None
    sparsity: UnitInterval = 0.5
    sinks: Count = 64
    recent: int = 256
    compresses = False

    def __post_init__(self) -> None:
        name = type(self).__name__.lower()
        if self.gates is None:
            raise ValueError(
                f"gates=None of the cache {name!r}, which needs a gate per head, trained for the model; expected a list per layer, or "
                "a JSON file of one"
            )
        object.__setattr__(self, "gates", read_heads("gates", self.gates))
        if max(map(max, self.gates)) > 1:
            raise ValueError(f"gates of the cache {name!r} hold a number above 1; expected 0 to 1")

    def check(self, total: int, layers: Mapping[int, Any]) -> None:
        check_heads("gates", self.gates, layers)

    def retrieval(self, place: int) -> tuple[int, ...]:
        """Returns the key/value heads of a layer that see all tokens."""
        every = np.concatenate(self.gates)
        if self.sparsity == 1:
            return ()
        least = np.quantile(every, self.sparsity)
        return tuple(np.flatnonzero(np.asarray(self.gates[place]) >= least).tolist())

    def begin(self, cache: Cache, heads: int, place: int) -> CacheState:
        everywhere = self.retrieval(place)
        streaming = tuple(g for g in range(cache.entries[0].shape[2]) if g not in everywhere)
        return TwoKinds(*self.empty(cache, everywhere, streaming), everywhere, streaming, self)

    def empty(
        self, cache: Cache, everywhere: tuple[int, ...], streaming: tuple[int, ...]
    ) -> tuple[Cache, Cache]:
        """Returns empty caches of the two kinds of heads, from an empty cache of all."""
        b, slots = cache.numbers.shape
        return tuple(
            empty_cache(
                *(
                    "duoattention",
                    b,
                    tuple((len(heads), x.shape[3]) for x in cache.entries),
                    cache.entries[0].dtype,
                ),
                **options,
            )
            for heads, options in (
                (everywhere, dict(max_length=slots)),
                (streaming, dict(max_length=None, window=self.recent, sinks=self.sinks)),
            )
        )


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["whole", "ends"],
    meta_fields=["everywhere", "streaming", "policy"],
)
@dataclasses.dataclass(frozen=True)
class TwoKinds(CacheState):
    """A cache of all tokens for some key/value heads, and one of the first and last tokens for the others.

    Attributes:
      whole, ends: the caches; a state stands for that of all tokens where a policy chooses what is read of it.
      everywhere, streaming: the key/value heads of each.
    """

    whole: Any
    ends: Any
    everywhere: tuple[int, ...]
    streaming: tuple[int, ...]
    policy: DuoAttention

    @property
    def slots(self) -> int:
        return self.whole.slots if isinstance(self.whole, CacheState) else self.whole.numbers.shape[1]

    def like(self, cache: Cache) -> "TwoKinds":
        whole, ends = self.policy.empty(cache, self.everywhere, self.streaming)
        whole = self.whole.like(whole) if isinstance(self.whole, CacheState) else whole
        return dataclasses.replace(self, whole=whole, ends=ends)

    def attend(
        self,
        view: View,
        q: Float[Array, "b t h k"],
        k: Float[Array, "b t g k"],
        v: Float[Array, "b t g v"],
        visit: Visit,
    ) -> tuple[Float[Array, "b t h v"], "TwoKinds"]:
        o = jnp.zeros((*q.shape[:3], v.shape[3]), v.dtype)
        each, caches = q.shape[2] // k.shape[2], []
        window = dict(window=self.policy.recent, sinks=self.policy.sinks)
        for cache, groups, rule in (
            (self.whole, self.everywhere, {}),
            (self.ends, self.streaming, window),
        ):
            own = np.asarray(groups, np.int32)
            heads = (own[:, None] * each + np.arange(each)).reshape(-1)
            sinks = None if view.logits.sink_logits is None else view.logits.sink_logits[heads]
            logits = dataclasses.replace(view.logits, sink_logits=sinks)
            if isinstance(cache, CacheState):
                part = View(SomeHeads(view.position, heads), logits, view.scale)
                found, cache = cache.attend(part, q[:, :, heads], k[:, :, own], v[:, :, own], visit)
                caches.append(cache)
                o = o.at[:, :, heads].set(found)
                continue
            cache, seen, beyond = extend(cache, (k[:, :, own], v[:, :, own]), visit, **rule)
            caches.append(cache)
            if not groups:
                continue
            found = relative_attention(
                *(SomeHeads(view.position, heads), q[:, :, heads], *seen.entries),
                causal=True,
                mask=Mask(window=rule.get("window"), sink_tokens=rule.get("sinks", 0)),
                logits=logits,
                segment_ids=visit.numbers,
                tokens=Tokens(seen.numbers, visit.positions, seen.positions),
                scale=view.scale,
            )
            o = o.at[:, :, heads].set(jnp.where(beyond[..., None, None], jnp.nan, found))
        return o, dataclasses.replace(self, whole=caches[0], ends=caches[1])


@dataclasses.dataclass(frozen=True)
class SomeHeads:
    """What positions add to the logits of some query heads."""

    position: Position
    chosen: Any

    @property
    def heads(self) -> int:
        """Number of these query heads."""
        return len(self.chosen)

    @property
    def slopes(self) -> Float[Array, "h"] | None:
        """As of `Position`."""
        return None if self.position.slopes is None else self.position.slopes[self.chosen]

    @property
    def has_bias(self) -> bool:
        """As of `Position`."""
        return self.position.has_bias

    def bias(
        self, q_positions: Int[Array, "b t"], kv_positions: Int[Array, "b s"]
    ) -> Float[Array, "b h t s"]:
        """As of `Position`."""
        return self.position.bias(q_positions, kv_positions)[:, self.chosen]
