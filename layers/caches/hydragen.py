"""Hydragen: what all prompts begin with is held once and read by all rows together (Juravsky et al. 2024, arXiv:2402.05099)."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from layers.caches.policy import CachePolicy
from layers.caches.state import CacheState, View
from layers.kernels.attention import Tokens, attention_with_lse, compose
from layers.options import checked_dataclass
from layers.parts.cache import Cache, extend
from layers.segments import Visit
from layers.typing import Array, Float


@checked_dataclass
class Hydragen(CachePolicy):
    """Hydragen: what all prompts begin with is held once, and read by all rows at once (Juravsky et al. 2024, arXiv:2402.05099).

        o = (w_1 o_1 + w_2 o_2) / (w_1 + w_2),   w = exp(lse - max lse)

    with o_1 attention of the queries of all rows, folded into one row, over the shared tokens, and o_2 of each row over its own. Exact:
    products of a matrix and a vector per row become products of matrices, and the shared tokens take memory and reading once. Rows of one
    call of `seqmodels.generate` share the longest beginning that all have, without the last token of any.
    """

    compresses = False
    shares = True

    def begin(self, cache: Cache, heads: int, place: int) -> CacheState | Cache:
        return cache

    def shared(self, cache: Cache, tokens: int, own: Cache) -> "Shared":
        """Returns the state of rows whose first `tokens` tokens are in a cache of one row; `own` is empty."""
        prefix = tuple(entry[:, :tokens] for entry in cache.entries)
        length = jnp.broadcast_to(cache.length, own.length.shape) - tokens
        return Shared(*prefix, own._replace(length=length))


@partial(jax.tree_util.register_dataclass, data_fields=["keys", "values", "own"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Shared(CacheState):
    """Keys and values of the shared tokens, (1, p, g, ...), and a cache of each row's own tokens."""

    keys: Any
    values: Any
    own: Cache

    @property
    def slots(self) -> int:
        return self.own.numbers.shape[1]

    def like(self, cache: Cache) -> "Shared":
        return dataclasses.replace(self, own=cache)

    def attend(
        self,
        view: View,
        q: Float[Array, "b t h k"],
        k: Float[Array, "b t g k"],
        v: Float[Array, "b t g v"],
        visit: Visit,
    ) -> tuple[Float[Array, "b t h v"], "Shared"]:
        (b, t, *rest), count = q.shape, self.keys.shape[1]
        own, seen, beyond = extend(self.own, (k, v), visit)

        def piece(q, keys, values, sinks, numbers, tokens, **options):
            position = view.position
            logits = dataclasses.replace(view.logits, sink_logits=sinks, slopes=position.slopes)
            if position.has_bias:
                bias = position.bias(tokens.q_positions, tokens.kv_positions)
                logits = dataclasses.replace(logits, bias=bias)
            return attention_with_lse(
                q,
                keys,
                values,
                logits=logits,
                segment_ids=numbers,
                tokens=tokens,
                scale=view.scale,
                **options,
            )

        # The shared tokens come before all others of the first segment of every row.
        numbers, positions = (x.reshape(1, b * t) for x in (visit.numbers, visit.positions))
        places = Tokens(jnp.ones((1, count), jnp.int32), positions, jnp.arange(count, dtype=jnp.int32)[None])
        first = piece(q.reshape(1, b * t, *rest), self.keys, self.values, None, numbers, places)
        first = jax.tree.map(lambda x: x.reshape(b, t, *x.shape[2:]), first)
        places = Tokens(seen.numbers, visit.positions, seen.positions)
        second = piece(q, *seen.entries, view.logits.sink_logits, visit.numbers, places, causal=True)
        o = compose(first, second).output.astype(v.dtype)
        return jnp.where(beyond[..., None, None], jnp.nan, o), dataclasses.replace(self, own=own)
