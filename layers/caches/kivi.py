"""KIVI: keys rounded by channel and values by token (Liu et al. 2024, arXiv:2402.02750)."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from layers.caches.policy import CachePolicy
from layers.caches.prompt import Prompt
from layers.caches.rounding import Rounded, restored, round_to
from layers.caches.state import CacheState, View
from layers.kernels.attention import Tokens
from layers.options import checked_dataclass
from layers.parts.cache import Cache
from layers.parts.relative_attention import relative_attention
from layers.segments import Visit
from layers.typing import Array, Float


@checked_dataclass
class KIVI(CachePolicy):
    """KIVI: a cache of 2, 4 or 8 bits, keys rounded by channel and values by token (Liu et al. 2024, arXiv:2402.02750).

        keys:    groups of `group` tokens of one channel;    whole blocks of `residual` tokens are rounded
        values:  groups of `group` channels of one token;    all but the last `residual` tokens are rounded

    as in `layers.caches.rounding`. The newer tokens stay as they are, fewer than `residual` keys and at most as many values. The prompt
    attends to itself without rounding. Numbers are restored at every call; what is saved is memory between calls.

    Attributes:
      bits: bits per number.
      group: tokens or channels that share a step.
      residual: a multiple of `group`.
    """

    bits: Literal[2, 4, 8] = 4
    group: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        if self.residual % self.group:
            raise ValueError(
                f"residual={self.residual} of the cache 'kivi'; expected a multiple of group={self.group}"
            )

    def check(self, total: int, layers: Mapping[int, Any]) -> None:
        for layer, config in layers.items():
            group = min(self.group, config.size)
            if group % (8 // self.bits) or config.size % group:
                raise ValueError(
                    f"head_dim={config.size} of layer {layer} does not fit the cache 'kivi' with bits={self.bits} and "
                    f"group={self.group}; expected a group that divides it and whole bytes"
                )

    def rounded_keys(self, keys: Float[Array, "b n g k"]) -> Rounded:
        """Returns keys rounded in groups of tokens, (b, n / group, group, g, k)."""
        b, n, *rest = keys.shape
        return round_to(keys.reshape(b, n // self.group, self.group, *rest), self.bits, axis=2)

    def rounded_values(self, values: Float[Array, "b n g v"]) -> Rounded:
        """Returns values rounded in groups of channels, (b, n, g, v / group, group)."""
        size = min(self.group, values.shape[3])
        return round_to(values.reshape(*values.shape[:3], -1, size), self.bits, axis=4)

    def compressed(
        self, prompts: Sequence[Prompt], views: Sequence[View], *, room: int, call: int = 1, **_: Any
    ) -> list[CacheState]:
        return [Few.of(prompt.cache, room, self) for prompt in prompts]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "new_keys", "new_values", "numbers", "positions", "length"],
    meta_fields=["policy"],
)
@dataclasses.dataclass(frozen=True)
class Few(CacheState):
    """Rounded keys and values of all tokens, in order, and the newest as they are.

    Attributes:
      keys: rounded keys (b, blocks, group, g, k), where their block is whole.
      values: rounded values (b, n, g, groups, group).
      new_keys, new_values: those of token i at i mod residual, (b, residual, g, ...).
      numbers, positions: as in `Cache`, (b, n).
      length: number of tokens of each row.
    """

    keys: Any
    values: Any
    new_keys: Any
    new_values: Any
    numbers: Any
    positions: Any
    length: Any
    policy: KIVI

    @classmethod
    def of(cls, cache: Cache, room: int, policy: KIVI) -> "Few":
        """Returns the tokens of a cache, with slots for more."""
        slots = cache.numbers.shape[1]
        keep = policy.residual
        more = -(slots + room) % keep + room

        def padded(x):
            return jnp.pad(x, [(0, more if axis == 1 else 0) for axis in range(x.ndim)])

        keys, values = map(padded, cache.entries)
        last = _last(cache.length, keep)[:, :, None, None]
        index = jnp.maximum(last, 0)
        new = (jnp.where(last >= 0, jnp.take_along_axis(x, index, axis=1), 0) for x in (keys, values))
        rounded = policy.rounded_keys(keys), policy.rounded_values(values)
        places = padded(cache.numbers), padded(cache.positions)
        return cls(*rounded, *new, *places, cache.length, policy)

    @property
    def slots(self) -> int:
        return self.numbers.shape[1]

    def like(self, cache: Cache) -> "Few":
        return Few.of(cache, 0, self.policy)

    def attend(
        self,
        view: View,
        q: Float[Array, "b t h k"],
        k: Float[Array, "b t g k"],
        v: Float[Array, "b t g v"],
        visit: Visit,
    ) -> tuple[Float[Array, "b t h v"], "Few"]:
        def step(few, token):
            q, k, v, number, position = (x[:, None] for x in token)
            few, beyond = few._with(k, v, number, position)
            keys, values = few.read()
            o = relative_attention(
                *(view.position, q, keys.astype(k.dtype), values.astype(v.dtype)),
                causal=True,
                logits=view.logits,
                segment_ids=number,
                tokens=Tokens(few.numbers, position, few.positions),
                scale=view.scale,
            )
            return few, jnp.where(beyond[:, None, None, None], jnp.nan, o)[:, 0]

        tokens = (jnp.moveaxis(x, 1, 0) for x in (q, k, v, visit.numbers, visit.positions))
        few, o = jax.lax.scan(step, self, tuple(tokens))
        return jnp.moveaxis(o, 0, 1), few

    def _with(self, k, v, number, position):
        """Returns the state with one more token, and in which rows there is no slot for it."""
        policy, rows = self.policy, jnp.arange(len(number))
        real, keep = number[:, 0] != 0, policy.residual
        beyond = real & (self.length >= self.slots)
        here = jnp.where(real, self.length, self.slots)
        ring = jnp.where(real & ~beyond, self.length % keep, keep)
        # The value that leaves makes room for the new one.
        leaving = jnp.where(self.length >= keep, self.length - keep, self.slots)
        leaving = jnp.where(real, leaving, self.slots)
        old = self.new_values[rows, self.length % keep][:, None]

        def put(into, at, x):
            return jax.tree.map(lambda into, x: into.at[rows, at].set(x[:, 0], mode="drop"), into, x)

        values = put(self.values, leaving, policy.rounded_values(old))
        new_values = put(self.new_values, ring, v.astype(self.new_values.dtype))
        new_keys = put(self.new_keys, ring, k.astype(self.new_keys.dtype))
        # A block of keys is rounded when its last token is there.
        each = keep // policy.group
        whole = real & (ring == keep - 1)
        block = jnp.where(whole, self.length // keep * each, self.keys.codes.shape[1])
        at = block[:, None] + jnp.arange(each)[None]
        keys = jax.tree.map(
            lambda into, x: into.at[rows[:, None], at].set(x, mode="drop"),
            self.keys,
            policy.rounded_keys(new_keys),
        )
        return (
            Few(
                *(keys, values, new_keys, new_values),
                put(self.numbers, here, number),
                put(self.positions, here, position),
                self.length + real,
                policy,
            ),
            beyond,
        )

    def read(self) -> tuple[Float[Array, "b n g k"], Float[Array, "b n g v"]]:
        """Returns the keys and values of all slots."""
        policy, times = self.policy, self.slots // self.policy.residual
        index, keep = jnp.arange(self.slots)[None], self.policy.residual
        rounded_keys = index < (self.length // keep * keep)[:, None]
        rounded_values = index < (self.length - keep)[:, None]
        keys, values = (
            jnp.where(chosen[..., None, None], restored(old, policy.bits).reshape(shape.shape), shape)
            for chosen, old, shape in (
                (rounded_keys, self.keys, jnp.tile(self.new_keys, (1, times, 1, 1))),
                (rounded_values, self.values, jnp.tile(self.new_values, (1, times, 1, 1))),
            )
        )
        return keys, values


def _last(length, count):
    """The index of the newest token whose index has each remainder, (b, count); below 0 where there is none."""
    remainder = jnp.arange(count)[None]
    newest = length[:, None] - 1
    return newest - (newest - remainder) % count
