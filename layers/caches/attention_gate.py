"""Attention-Gate: trained gates decide which tokens later queries see (Zeng et al. 2024, arXiv:2410.12876)."""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from layers.caches.kept import Kept, kept_best
from layers.caches.locret import features_of
from layers.caches.policy import CachePolicy
from layers.caches.selecting import to_heads
from layers.caches.state import CacheState, View
from layers.caches.trained import check_trained, read_trained
from layers.kernels.attention import Tokens, attention
from layers.options import Fraction, checked_dataclass
from layers.parts.cache import Cache, Seen, empty_cache, extend
from layers.segments import Visit
from layers.typing import Array, Float

ARRAYS = "query", "key", "value", "output", "bias"


@checked_dataclass
class AttentionGate(CachePolicy):
    """Attention-Gate: trained gates decide which tokens later queries see (Zeng et al. 2024, arXiv:2410.12876).

        u_i = sum_{j <= i} softmax_j(x_i A . x_j B / sqrt(w)) x_j C,    z_i = u_i D + b      (g)
        head g keeps token i if sigmoid(z_ig) > threshold

    with several heads of w features in u, and x = [q, k, v] the features of all heads side by side, not rotated, which are linear maps of
    what the paper's gates read. A query sees itself and the kept tokens before it, in prompts and new tokens alike. Of more than
    `budget` kept tokens those of largest z stay, after every `chunk` tokens of a call and at its end. Gates read what is before a token, so
    that a prompt can be cut anywhere; the paper's read the whole context. Their own keys and values of all tokens stay in memory. They are
    trained by `experiments.training.gating.train_gates`.

    Attributes:
      gates: an npz file of A, B, C, D and b per layer with a cache, in order, which `train_gates` makes.
      threshold: probability above which a token is kept.
      budget: the most tokens that each head keeps.
      chunk: the most tokens that are read at once.
    """

    gates: Any = None
    threshold: Fraction = 0.5
    budget: int = 4096
    chunk: int = 1024
    compresses = False

    def __post_init__(self) -> None:
        maker = "experiments.training.gating.train_gates"
        given = read_trained("gates", self.gates, ARRAYS, policy="attention_gate", maker=maker)
        object.__setattr__(self, "gates", given)

    def check(self, total: int, layers: Mapping[int, Any]) -> None:
        super().check(total, layers)
        check_trained("gates", self.gates, layers, policy="attention_gate", ends=("query", "output"))

    @property
    def least(self) -> float:
        """The z above which a token is kept."""
        return math.log(self.threshold / (1 - self.threshold)) if self.threshold else -math.inf

    def begin(self, cache: Cache, heads: int, place: int) -> CacheState:
        rows, whole = cache.numbers.shape
        shapes = (self.gates.layers[place]["query"].shape[1:],) * 2
        gates = empty_cache("attention_gate", rows, shapes, jnp.float32, max_length=whole)
        return Gated(Kept.empty(self, cache, self.budget + self.chunk, "gate"), gates, place)

    def best(self, kept: Kept) -> Kept:
        """Returns the tokens of each row's current segment that stay."""
        here = (kept.numbers != 0) & (kept.numbers == kept.numbers.max((1, 2), keepdims=True))
        gate = kept.extra["gate"]
        return kept_best(kept, jnp.where(here & (gate > self.least), gate, -jnp.inf), self.budget)


def projected(arrays: Mapping[str, Any], features: Float[Array, "b t f"]) -> list[Float[Array, "b t m w"]]:
    """Returns the queries, keys and values of gates, float32."""
    features = features.astype(jnp.float32)
    return [
        jnp.einsum("btf,fmw->btmw", features, jnp.asarray(arrays[name])) for name in ("query", "key", "value")
    ]


def gate_logits(
    arrays: Mapping[str, Any], query: Float[Array, "b t m w"], seen: Seen, visit: Visit
) -> Float[Array, "b t g"]:
    """Returns z of new tokens, given the keys and values of gates that they see."""
    tokens = Tokens(seen.numbers, visit.positions, seen.positions)
    u = attention(query, *seen.entries, causal=True, segment_ids=visit.numbers, tokens=tokens)
    return (
        jnp.einsum("btmw,mwg->btg", u, jnp.asarray(arrays["output"]))
        + jnp.asarray(arrays["bias"])[None, None]
    )


@partial(jax.tree_util.register_dataclass, data_fields=["kept", "gates"], meta_fields=["place"])
@dataclasses.dataclass(frozen=True)
class Gated(CacheState):
    """The tokens that gates keep.

    Attributes:
      kept: the tokens, with z as "gate".
      gates: keys and values of the gates of all tokens.
      place: number of the layer among those with a cache.
    """

    kept: Kept
    gates: Cache
    place: int

    @property
    def slots(self) -> int:
        return self.gates.numbers.shape[1]

    def like(self, cache: Cache) -> CacheState:
        return self.kept.policy.begin(cache, 0, self.place)

    def attend(
        self,
        view: View,
        q: Float[Array, "b t h k"],
        k: Float[Array, "b t g k"],
        v: Float[Array, "b t g v"],
        visit: Visit,
    ) -> tuple[Float[Array, "b t h v"], "Gated"]:
        policy, kept, outputs, heads = self.kept.policy, self.kept, [], q.shape[2]
        arrays = policy.gates.layers[self.place]
        query, *entries = projected(arrays, features_of(view, q, k, v, visit.positions))
        gates, seen, beyond = extend(self.gates, tuple(entries), visit)
        gate = gate_logits(arrays, query, seen, visit)
        for start in range(0, max(1, q.shape[1]), policy.chunk):
            piece = slice(start, start + policy.chunk)
            here = visit._replace(numbers=visit.numbers[:, piece], positions=visit.positions[:, piece])
            kept, full = kept.added(k[:, piece], v[:, piece], here, {"gate": gate[:, piece]})
            bias = view.bias(here.numbers, here.positions, kept.numbers, kept.positions)
            is_open, positions = (
                to_heads(jnp.moveaxis(x, 2, 1), heads)[:, :, None]
                for x in (kept.extra["gate"] > policy.least, kept.positions)
            )
            own = positions == here.positions[:, None, :, None]
            logits = dataclasses.replace(view.logits, bias=jnp.where(is_open | own, bias, -jnp.inf))
            o = attention(q[:, piece], kept.keys, kept.values, logits=logits, scale=view.scale)
            outputs.append(jnp.where((full | beyond[:, piece])[..., None, None], jnp.nan, o))
            kept = policy.best(kept)
        return jnp.concatenate(outputs, axis=1), dataclasses.replace(self, kept=kept, gates=gates)
