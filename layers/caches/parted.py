"""Caches in parts: tokens of the prompt in forms that take less memory, beside tokens as they are."""

import dataclasses
import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from layers.caches.kept import Kept
from layers.caches.rounding import Rounded, restored, round_to
from layers.caches.state import CacheState, View, emptied
from layers.kernels.attention import attention_with_lse, compose
from layers.parts.cache import Cache
from layers.segments import Visit
from layers.typing import Array, Float, Int


@partial(jax.tree_util.register_dataclass, data_fields=["old", "kept"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Parted(CacheState):
    """One softmax over parts, each with tokens of its own per key/value head.

    Attributes:
      old: parts of the prompt, which have `numbers` and `positions` (b, m, g) as `Kept` does, and
        `read(q) -> (q, keys, values)`.
      kept: the tokens that are as they were, and room for new ones.
    """

    old: tuple[Any, ...]
    kept: Kept

    @property
    def slots(self) -> int:
        return self.kept.slots

    def like(self, cache: Cache) -> "Parted":
        return emptied(self, cache)

    def attend(
        self,
        view: View,
        q: Float[Array, "b t h k"],
        k: Float[Array, "b t g k"],
        v: Float[Array, "b t g v"],
        visit: Visit,
    ) -> tuple[Float[Array, "b t h v"], "Parted"]:
        kept, beyond = self.kept.added(k, v, visit)
        scale = q.shape[3] ** -0.5 if view.scale is None else view.scale

        def piece(part, queries, keys, values, sinks):
            bias = view.bias(visit.numbers, visit.positions, part.numbers, part.positions)
            logits = dataclasses.replace(view.logits, bias=bias, sink_logits=sinks)
            return attention_with_lse(
                queries, keys.astype(k.dtype), values.astype(v.dtype), logits=logits, scale=scale
            )

        pieces = [piece(part, *part.read(q), None) for part in self.old]
        pieces.append(piece(kept, q, kept.keys, kept.values, view.logits.sink_logits))
        o = functools.reduce(compose, pieces).output.astype(v.dtype)
        return jnp.where(beyond[..., None, None], jnp.nan, o), dataclasses.replace(self, kept=kept)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "key_factors", "value_factors", "numbers", "positions"],
    meta_fields=["bits"],
)
@dataclasses.dataclass(frozen=True)
class RoundedTokens:
    """Rounded keys and values.

    Attributes:
      keys, values: rounded k * key_factors and v * value_factors, of (b, m, g, ...).
      key_factors, value_factors: per channel, (b, 1, g, ...).
      numbers, positions: as in `Kept`.
      bits: bits per number.
    """

    keys: Rounded
    values: Rounded
    key_factors: Any
    value_factors: Any
    numbers: Any
    positions: Any
    bits: int

    @classmethod
    def of(
        cls,
        kept: Kept,
        bits: int,
        *,
        key_axis: int,
        key_factors: Float[Array, "b 1 g k"],
        value_factors: Float[Array, "b 1 g v"],
    ) -> "RoundedTokens":
        """Returns the tokens of `kept`, values rounded by token, and keys by token (key_axis=3) or by channel (1)."""
        # Empty slots repeat the first one, so that they change no step.
        there = (kept.numbers != 0)[..., None]
        keys, values = (jnp.where(there, x, x[:, :1]).astype(jnp.float32) for x in (kept.keys, kept.values))
        return cls(
            round_to(keys * key_factors, bits, key_axis),
            round_to(values * value_factors, bits, 3),
            key_factors,
            value_factors,
            kept.numbers,
            kept.positions,
            bits,
        )

    def read(
        self, q: Float[Array, "b t h k"]
    ) -> tuple[Float[Array, "b t h k"], Float[Array, "b m g k"], Float[Array, "b m g v"]]:
        """Returns the queries, and the keys and values that the codes stand for."""
        keys = restored(self.keys, self.bits) / self.key_factors
        return q, keys, restored(self.values, self.bits) / self.value_factors


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "channels", "numbers", "positions"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class FewChannels:
    """Keys of some channels.

    Attributes:
      keys, values: (b, m, g, c) and (b, m, g, v).
      channels: the channels of the keys, (b, g, c).
      numbers, positions: as in `Kept`.
    """

    keys: Any
    values: Any
    channels: Any
    numbers: Any
    positions: Any

    @classmethod
    def of(cls, kept: Kept, channels: Int[Array, "b g c"]) -> "FewChannels":
        """Returns the tokens of `kept` with these channels of their keys."""
        keys = jnp.take_along_axis(kept.keys, channels[:, None], axis=3)
        return cls(keys, kept.values, channels, kept.numbers, kept.positions)

    def read(
        self, q: Float[Array, "b t h k"]
    ) -> tuple[Float[Array, "b t h c"], Float[Array, "b m g c"], Float[Array, "b m g v"]]:
        """Returns the channels of the queries, and the keys and values."""
        (b, t, h, width), groups = q.shape, self.channels.shape[1]
        q = q.reshape(b, t, groups, h // groups, width)
        q = jnp.take_along_axis(q, self.channels[:, None, :, None], axis=4)
        return q.reshape(b, t, h, -1), self.keys, self.values
