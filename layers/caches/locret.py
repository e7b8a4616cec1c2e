"""Locret: trained heads score tokens once, and the best stay (Huang et al. 2024, arXiv:2410.01805)."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from layers.caches.kept import Kept, kept_best
from layers.caches.policy import CachePolicy
from layers.caches.state import CacheState, View
from layers.caches.trained import check_trained, read_trained
from layers.kernels.attention import attention
from layers.options import Count, checked_dataclass
from layers.parts.cache import Cache
from layers.segments import Visit
from layers.typing import Array, Float

ARRAYS = "first", "second"


@checked_dataclass
class Locret(CachePolicy):
    """Locret: trained heads score tokens once, and those of largest scores stay (Huang et al. 2024, arXiv:2410.01805).

        s_j = W_2 silu(W_1 [q_j, k_j, v_j])      (g),   the features of all heads side by side, not rotated

    After every `chunk` tokens of a call, and at its end, each key/value head keeps the last `recent` tokens and, of the others, the
    budget - recent of largest s, of prompts and new tokens alike. So a prompt of any length is read with budget + chunk slots. Scores
    never change. The heads are trained on a model's own attention by `experiments.training.retaining.train_heads`.

    Attributes:
      heads: an npz file of W_1 and W_2 per layer with a cache, in order, which `train_heads` makes.
      budget: tokens that each head keeps.
      recent: last tokens among them.
      chunk: the most tokens that are read at once.
    """

    heads: Any = None
    budget: int = 6000
    recent: Count = 2500
    chunk: int = 3072
    compresses = False

    def __post_init__(self) -> None:
        maker = "experiments.training.retaining.train_heads"
        object.__setattr__(
            self, "heads", read_trained("heads", self.heads, ARRAYS, policy="locret", maker=maker)
        )
        if self.recent > self.budget:
            raise ValueError(
                f"budget={self.budget} of the cache 'locret' with recent={self.recent}; expected at least the recent tokens"
            )

    def check(self, total: int, layers: Mapping[int, Any]) -> None:
        super().check(total, layers)
        check_trained("heads", self.heads, layers, policy="locret", ends=("first", "second"))

    def begin(self, cache: Cache, heads: int, place: int) -> CacheState:
        return Retained(Kept.empty(self, cache, self.budget + self.chunk, "score"), place)

    def best(self, kept: Kept) -> Kept:
        """Returns the tokens of each row's current segment that stay."""
        here = (kept.numbers != 0) & (kept.numbers == kept.numbers.max((1, 2), keepdims=True))
        last = jnp.where(here, kept.positions, -1).max((1, 2), keepdims=True)
        scores = jnp.where(kept.positions > last - self.recent, jnp.inf, kept.extra["score"])
        return kept_best(kept, jnp.where(here, scores, -jnp.inf), self.budget)

    def scores_of(self, place: int, features: Float[Array, "b t f"]) -> Float[Array, "b t g"]:
        """Returns s of tokens, given [q, k, v]."""
        return retaining_scores(self.heads.layers[place], features)


def retaining_scores(arrays: Mapping[str, Any], features: Float[Array, "b t f"]) -> Float[Array, "b t g"]:
    """Returns W_2 silu(W_1 x), float32."""
    hidden = jax.nn.silu(features.astype(jnp.float32) @ jnp.asarray(arrays["first"]))
    return hidden @ jnp.asarray(arrays["second"])


def features_of(
    view: View,
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t g v"],
    positions: Any,
) -> Float[Array, "b t f"]:
    """Returns [q, k, v] of tokens, not rotated."""
    parts = view.position.turn(q, -positions), view.position.turn(k, -positions), v
    return jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in parts], axis=2)


@partial(jax.tree_util.register_dataclass, data_fields=["kept"], meta_fields=["place"])
@dataclasses.dataclass(frozen=True)
class Retained(CacheState):
    """The tokens of largest scores.

    Attributes:
      kept: the tokens, with their "score".
      place: number of the layer among those with a cache.
    """

    kept: Kept
    place: int

    @property
    def slots(self) -> int:
        return self.kept.slots

    def like(self, cache: Cache) -> "Retained":
        return dataclasses.replace(self, kept=self.kept.like(cache))

    def attend(
        self,
        view: View,
        q: Float[Array, "b t h k"],
        k: Float[Array, "b t g k"],
        v: Float[Array, "b t g v"],
        visit: Visit,
    ) -> tuple[Float[Array, "b t h v"], "Retained"]:
        policy, kept, outputs = self.kept.policy, self.kept, []
        score = policy.scores_of(self.place, features_of(view, q, k, v, visit.positions))
        for start in range(0, max(1, q.shape[1]), policy.chunk):
            piece = slice(start, start + policy.chunk)
            here = visit._replace(numbers=visit.numbers[:, piece], positions=visit.positions[:, piece])
            kept, beyond = kept.added(k[:, piece], v[:, piece], here, {"score": score[:, piece]})
            bias = view.bias(here.numbers, here.positions, kept.numbers, kept.positions)
            logits = dataclasses.replace(view.logits, bias=bias)
            o = attention(q[:, piece], kept.keys, kept.values, logits=logits, scale=view.scale)
            outputs.append(jnp.where(beyond[..., None, None], jnp.nan, o))
            kept = policy.best(kept)
        return jnp.concatenate(outputs, axis=1), dataclasses.replace(self, kept=kept)
