"""What stands in place of a cache of attention when a policy keeps it, and how its queries weigh keys."""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from layers.kernels.attention import Logits, Tokens, key_mass
from layers.parameters import Linear
from layers.parts.cache import Cache
from layers.segments import Visit
from layers.typing import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class View:
    """How the queries of a layer of attention weigh keys.

    Attributes:
      position: positions of the layer, a `Position` or what stands for one; rotary ones are in queries and keys already.
      logits: what happens to the logits besides biases of positions.
      scale: factor on the logits; 1 / sqrt(k) if None.
      projections: the linear maps to keys and to values, for policies that read their matrices; None where there are others.
    """

    position: Any
    logits: Logits
    scale: float | None
    projections: tuple[Linear, Linear] | None = None

    def bias(
        self,
        q_numbers: Int[Array, "b t"],
        q_positions: Int[Array, "b t"],
        numbers: Int[Array, "b n #g"],
        positions: Int[Array, "b n #g"],
    ) -> Float[Array, "b h t n"]:
        """Returns what is added to the logits of keys; -inf hides a key.

        A query sees the keys of its segment whose position is not beyond its own.

        Args:
          q_numbers, q_positions: segments of the queries, 0 at padding, and their positions.
          numbers, positions: those of the keys per key/value head, with g = 1 where all heads hold the same; number 0 is an empty slot.
        """
        groups, each = numbers.shape[2], self.position.heads // numbers.shape[2]
        seen = (numbers[:, None] == q_numbers[..., None, None]) & (q_numbers != 0)[..., None, None]
        seen &= positions[:, None] <= q_positions[..., None, None]
        bias = jnp.repeat(jnp.moveaxis(jnp.where(seen, 0.0, -jnp.inf), 3, 1), each, axis=1)
        if (slopes := self.position.slopes) is not None:
            distance = jnp.abs(q_positions[..., None, None] - positions[:, None]).astype(jnp.float32)
            distance = jnp.repeat(jnp.moveaxis(distance, 3, 1), each, axis=1)
            bias -= slopes[None, :, None, None] * distance
        if self.position.has_bias:
            found = jax.vmap(self.position.bias, (None, 2), 1)(q_positions, positions)  # b g h t n
            found = found.reshape(found.shape[0], groups, groups, each, *found.shape[3:])
            own = jnp.arange(groups)
            bias += found[:, own, own].reshape(bias.shape)
        return bias

    def mass(
        self,
        q: Float[Array, "b t h k"],
        cache: Cache,
        visit: Visit,
        chosen: Bool[Array, "b t"] | None = None,
    ) -> Float[Array, "b s h"]:
        """Returns the sum of the weights that new tokens, or some `chosen` ones, give each key of a cache that holds them."""
        chosen = visit.numbers != 0 if chosen is None else chosen
        logits = dataclasses.replace(self.logits, slopes=self.position.slopes)
        if self.position.has_bias:
            logits = dataclasses.replace(logits, bias=self.position.bias(visit.positions, cache.positions))
        return key_mass(
            *(q, cache.entries[0]),
            query_weights=chosen[..., None].astype(jnp.float32),
            causal=True,
            logits=logits,
            segment_ids=visit.numbers,
            tokens=Tokens(cache.numbers, visit.positions, cache.positions),
            scale=self.scale,
        )

    def products(
        self, q: Float[Array, "b t h k"], keys: Float[Array, "b n g k"], bias: Float[Array, "b h t n"]
    ) -> Float[Array, "b h t n"]:
        """Returns the logits, float32; -inf where a key is hidden."""
        (b, t, h, width), groups = q.shape, keys.shape[2]
        scale = width**-0.5 if self.scale is None else self.scale
        q, keys = (x.astype(jnp.float32) for x in (q, keys))
        logits = scale * jnp.einsum(
            "btgrk,bngk->bgrtn",
            q.reshape(b, t, groups, h // groups, width),
            keys,
            precision=jax.lax.Precision.HIGHEST,
        ).reshape(bias.shape)
        if (cap := self.logits.logit_cap) is not None:
            logits = cap * jnp.tanh(logits / cap)
        return logits + bias

    def weights(
        self, q: Float[Array, "b t h k"], keys: Float[Array, "b n g k"], bias: Float[Array, "b h t n"]
    ) -> Float[Array, "b h t n"]:
        """Returns the weights of attention, float32; 0 for queries that see no key."""
        return softmax(self.products(q, keys, bias), self.logits.sink_logits)


def softmax(
    logits: Float[Array, "b h t n"], sink_logits: Float[Array, "h"] | None = None
) -> Float[Array, "b h t n"]:
    """Returns the softmax over the last axis, 0 in rows that are -inf throughout; `sink_logits` are a key per head more."""
    top = logits.max(-1, keepdims=True)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    weights = jnp.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    if sink_logits is not None:
        total += jnp.exp(sink_logits.astype(jnp.float32)[None, :, None, None] - top)
    return weights / jnp.where(total == 0, 1.0, total)


class CacheState(abc.ABC):
    """Base class of states that a policy puts in place of a `layers.parts.cache.Cache`: registered dataclasses."""

    @property
    @abc.abstractmethod
    def slots(self) -> int:
        """The number that `like` takes the size from."""

    @abc.abstractmethod
    def like(self, cache: Cache) -> "CacheState":
        """Returns an empty state of this kind for as many slots and rows as an empty cache has."""

    @abc.abstractmethod
    def attend(
        self,
        view: View,
        q: Float[Array, "b t h k"],
        k: Float[Array, "b t g k"],
        v: Float[Array, "b t g v"],
        visit: Visit,
    ) -> tuple[Float[Array, "b t h v"], "CacheState"]:
        """Returns the outputs of new tokens, NaN where there was no slot for one, and the state with them."""


def emptied(state: Any, cache: Cache) -> Any:
    """Returns a state of zeros in the shapes of another, for as many rows as a cache has."""
    rows = cache.length.shape[0]
    return jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), state)


def free_slots(
    numbers: Int[Array, "b n g"], real: Bool[Array, "b t"]
) -> tuple[Int[Array, "b t g"], Bool[Array, "b t"]]:
    """Returns an empty slot per head for each new token, beyond the end where there is none or the token is padding.

    Returns:
      The slots, and which tokens found none in some head.
    """
    slots, time = numbers.shape[1], real.shape[1]
    empty = jnp.moveaxis(numbers == 0, 1, 2)
    free, index = jax.lax.top_k(empty.astype(jnp.int32), min(slots, time))
    index = jnp.where(free == 1, index, slots)
    index = jnp.pad(index, ((0, 0), (0, 0), (0, time - index.shape[2])), constant_values=slots)
    order = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
    index = jnp.take_along_axis(index, order[:, None], axis=2)
    index = jnp.moveaxis(jnp.where(real[:, None], index, slots), 2, 1)
    return index, real & (index == slots).any(2)


def put(into: Array, index: Int[Array, "b t g"], x: Any) -> Array:
    """Returns `into` (b, n, g, ...) with x (b, t, g, ...) at the slots of each head; slots beyond the end are dropped."""
    b, _, groups = index.shape
    rows, heads = jnp.arange(b)[:, None, None], jnp.arange(groups)[None, None]
    return into.at[rows, index, heads].set(jnp.asarray(x, into.dtype), mode="drop")


def take(x: Array, index: Int[Array, "b m g"]) -> Array:
    """Returns x (b, s, g, ...) at the slots of each head, (b, m, g, ...)."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 3)), axis=1)
