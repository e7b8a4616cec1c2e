"""Lean Attention: steps read the cache in equal parts, across heads and rows (Sanovar et al. 2024, arXiv:2405.10480)."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from layers.caches.policy import CachePolicy
from layers.caches.state import CacheState, View
from layers.kernels.attention import Piece, Tokens, compose
from layers.options import checked_dataclass
from layers.parts.cache import Cache, extend
from layers.parts.lean_attention import lean_attention
from layers.parts.relative_attention import relative_attention
from layers.segments import Visit
from layers.typing import Array, Float


@checked_dataclass
class Lean(CachePolicy):
    """Lean Attention: steps read the cache in equal parts, across heads and rows (Sanovar et al. 2024, arXiv:2405.10480).

        o = sum_i exp(lse_i) o_i / sum_i exp(lse_i),   i the tiles of a row and head, wherever they are read

    Exact. The tiles that hold tokens, of all rows and heads, are divided evenly among `units` (see
    `layers.parts.lean_attention`), so that a step costs what the rows have and not what the longest has. Calls on several tokens are
    those without a policy.

    Attributes:
      units: parts that are read side by side, such as the multiprocessors of a GPU.
      tile: tokens in a tile.
    """

    units: int = 132
    tile: int = 256
    compresses = False

    def begin(self, cache: Cache, heads: int, place: int) -> CacheState:
        return InTiles(cache, self)


@partial(jax.tree_util.register_dataclass, data_fields=["cache"], meta_fields=["policy"])
@dataclasses.dataclass(frozen=True)
class InTiles(CacheState):
    """A cache of all tokens that steps read tile by tile."""

    cache: Cache
    policy: Lean

    @property
    def slots(self) -> int:
        return self.cache.numbers.shape[1]

    def like(self, cache: Cache) -> "InTiles":
        return InTiles(cache, self.policy)

    def attend(
        self,
        view: View,
        q: Float[Array, "b t h k"],
        k: Float[Array, "b t g k"],
        v: Float[Array, "b t g v"],
        visit: Visit,
    ) -> tuple[Float[Array, "b t h v"], "InTiles"]:
        cache, seen, beyond = extend(self.cache, (k, v), visit)
        if q.shape[1] == 1:
            o = self._step(view, q[:, 0], cache, visit)
        else:
            tokens = Tokens(seen.numbers, visit.positions, seen.positions)
            options = dict(causal=True, segment_ids=visit.numbers, tokens=tokens, scale=view.scale)
            o = relative_attention(view.position, q, *seen.entries, logits=view.logits, **options)
        o = jnp.where(beyond[..., None, None], jnp.nan, o.astype(v.dtype))
        return o, dataclasses.replace(self, cache=cache)

    def _step(self, view, q, cache, visit):
        """Returns the outputs of one query per row."""
        keys, values = cache.entries
        groups, heads = keys.shape[2], q.shape[1]

        def logits_of(q, keys, row, group, slots):
            shape = (*slots.shape, groups)
            numbers, positions = (
                jnp.broadcast_to(x[row[:, None], slots][..., None], shape)
                for x in (cache.numbers, cache.positions)
            )
            bias = view.bias(visit.numbers[row], visit.positions[row], numbers, positions)
            bias = bias.reshape(len(row), groups, heads // groups, 1, -1)[jnp.arange(len(row)), group]
            return view.products(q[:, None], keys[:, :, None], bias)[:, :, 0]

        piece = lean_attention(
            *(q, keys, values, jnp.minimum(cache.length, self.slots)),
            logits_of=logits_of,
            units=self.policy.units,
            tile=self.policy.tile,
        )
        if (sinks := view.logits.sink_logits) is not None:
            lse = jnp.broadcast_to(sinks.astype(jnp.float32), piece.lse.shape)
            piece = compose(piece, Piece(jnp.zeros_like(piece.output), lse))
        return piece.output
