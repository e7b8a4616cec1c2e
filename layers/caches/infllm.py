"""InfLLM: far tokens are read by units that their representative keys choose (Xiao et al. 2024, arXiv:2402.04617)."""

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from layers.caches.policy import CachePolicy
from layers.caches.selecting import among_best, to_heads
from layers.caches.state import CacheState, View
from layers.kernels.attention import attention_with_lse, compose
from layers.options import Count, checked_dataclass
from layers.parts.cache import Cache, extend
from layers.parts.position_blocks import block_index
from layers.segments import Visit
from layers.typing import Array, Bool, Float, Int


@checked_dataclass
class InfLLM(CachePolicy):
    """InfLLM: beside a window, queries read units of far tokens that they choose (Xiao et al. 2024, arXiv:2402.04617).

        r_m = 1 / window sum_{i=1}^{window} q_{m+i} . k_m,   c_u the mean of the `representatives` keys of largest r in unit u
        query i reads   the first `sinks` tokens, i - window < j <= i, and the budget // unit units u of largest sum_heads q_i . c_u

    of prompts and new tokens alike. Representatives are per query head, the choice is the same in all heads. A unit can be chosen once all
    its tokens have left the window; those that left before it are read. With distance="window", far tokens are as far as the window
    is long, so that no distance is larger. The paper adds what the queries of a call like; here each query chooses for itself, so that
    a prompt can be cut anywhere. Its released code sums weights of attention for r. All keys stay in memory.

    Attributes:
      budget: tokens of the units that are chosen, a multiple of `unit`.
      window: number of last tokens, the query's own included.
      sinks: first tokens that are read in any case.
      unit: tokens in a unit.
      representatives: keys that stand for a unit.
      distance: "window", or "true" for distances as they are. Positions that are not rotary keep theirs.
    """

    budget: int = 2048
    window: int = 4096
    sinks: Count = 128
    unit: int = 128
    representatives: int = 4
    distance: Literal["window", "true"] = "window"
    compresses = False

    def __post_init__(self) -> None:
        if self.budget % self.unit:
            raise ValueError(
                f"budget={self.budget} of the cache 'infllm' with unit={self.unit}; expected a multiple of the unit"
            )
        if self.representatives > self.unit:
            raise ValueError(
                f"representatives={self.representatives} of the cache 'infllm' with unit={self.unit}; expected at most the unit"
            )

    def begin(self, cache: Cache, heads: int, place: int) -> CacheState:
        return Memory(
            cache, jnp.zeros((len(cache.numbers), heads, cache.numbers.shape[1]), jnp.float32), self
        )


@partial(jax.tree_util.register_dataclass, data_fields=["cache", "salience"], meta_fields=["policy"])
@dataclasses.dataclass(frozen=True)
class Memory(CacheState):
    """All tokens, and how much the queries after each liked it.

    Attributes:
      cache: keys and values of all tokens, in order.
      salience: r per query head and token, (b, h, s).
    """

    cache: Cache
    salience: Any
    policy: InfLLM

    @property
    def slots(self) -> int:
        return self.cache.numbers.shape[1]

    def like(self, cache: Cache) -> "Memory":
        return self.policy.begin(cache, self.salience.shape[1], 0)

    def attend(
        self,
        view: View,
        q: Float[Array, "b t h k"],
        k: Float[Array, "b t g k"],
        v: Float[Array, "b t g v"],
        visit: Visit,
    ) -> tuple[Float[Array, "b t h v"], "Memory"]:
        policy, window = self.policy, self.policy.window
        cache, seen, beyond = extend(self.cache, (k, v), visit)
        keys, values = seen.entries
        same = (cache.numbers[:, None] == visit.numbers[..., None]) & (visit.numbers != 0)[..., None]
        distance = visit.positions[..., None] - cache.positions[:, None]
        by_head = to_heads(jnp.moveaxis(keys, 2, 1), q.shape[2]).astype(jnp.float32)
        high = dict(precision=jax.lax.Precision.HIGHEST)
        products = jnp.einsum("bthk,bhsk->bhts", q.astype(jnp.float32), by_head, **high)
        following = same & (distance >= 1) & (distance <= window)
        salience = self.salience + jnp.where(following[:, None], products, 0.0).sum(2) / window
        far_q, far_keys = q, keys
        if policy.distance == "window":
            far_q = view.position.turn(q, window - visit.positions)
            far_keys = view.position.turn(keys, -cache.positions)
        unread = self.unread(cache, salience, far_q, far_keys, same, distance)
        # What the bias of positions hides stays hidden.
        held = cache.numbers[..., None], cache.positions[..., None]
        bias = view.bias(visit.numbers, visit.positions, *held)

        def piece(queries, keys, chosen, sinks):
            logits = dataclasses.replace(
                view.logits, bias=jnp.where(chosen[:, None], bias, -jnp.inf), sink_logits=sinks
            )
            return attention_with_lse(queries, keys, values, logits=logits, scale=view.scale)

        near = piece(q, keys, distance < window, view.logits.sink_logits)
        far = piece(far_q, far_keys, (distance >= window) & ~unread, None)
        o = compose(near, far).output.astype(v.dtype)
        made = dataclasses.replace(self, cache=cache, salience=salience)
        return jnp.where(beyond[..., None, None], jnp.nan, o), made

    def unread(
        self,
        cache: Cache,
        salience: Float[Array, "b h s"],
        q: Float[Array, "b t h k"],
        keys: Float[Array, "b s g k"],
        same: Bool[Array, "b t s"],
        distance: Int[Array, "b t s"],
    ) -> Bool[Array, "b t s"]:
        """Returns which tokens each query leaves out: those of units that it could choose and did not."""
        policy, s = self.policy, self.slots
        old = cache.positions >= policy.sinks
        units = block_index(
            jnp.where(old, cache.numbers, 0), jnp.where(old, cache.positions - policy.sinks, 0) // policy.unit
        )
        first, last = (
            jax.vmap(lambda x, index, reduce=reduce: reduce(x, index, s + 1)[:s])(cache.positions, units)
            for reduce in (jax.ops.segment_min, jax.ops.segment_max)
        )
        inside = jnp.minimum(units, s - 1)
        # Of a whole unit, the last token is the nearest.
        whole = jnp.take_along_axis(last - first + 1 == policy.unit, inside, axis=1) & (units < s)
        to_last = jnp.take_along_axis(last, inside, axis=1) - cache.positions
        left = same & whole[:, None] & (distance - to_last[:, None] >= policy.window)
        likes = jnp.einsum(
            "bthk,bhuk->btu",
            q.astype(jnp.float32),
            self.representatives(salience, keys, units),
            precision=jax.lax.Precision.HIGHEST,
        )
        likes = jnp.take_along_axis(likes, jnp.broadcast_to(inside[:, None], left.shape), axis=2)
        of_unit = jax.vmap(lambda x, index: jax.ops.segment_max(x, index, s + 1)[:s])(
            jnp.moveaxis(jnp.where(left, likes, -jnp.inf), 2, 1), units
        )
        chosen = among_best(jnp.moveaxis(of_unit, 2, 1), policy.budget // policy.unit)
        return left & ~jnp.take_along_axis(chosen, jnp.broadcast_to(inside[:, None], left.shape), axis=2)

    def representatives(
        self, salience: Float[Array, "b h s"], keys: Float[Array, "b s g k"], units: Int[Array, "b s"]
    ) -> Float[Array, "b h u k"]:
        """Returns c of each unit and query head."""
        s, most = self.slots, self.policy.representatives

        def of_head(salience, keys, units):
            order = jnp.lexsort((-salience, units))
            ordered = units[order]
            starts = jax.ops.segment_min(jnp.arange(s), ordered, s + 1)
            rank = jnp.zeros(s, jnp.int32).at[order].set(jnp.arange(s, dtype=jnp.int32) - starts[ordered])
            chosen = jnp.where((rank < most)[:, None], keys, 0.0)
            return jax.ops.segment_sum(chosen, units, s + 1)[:s] / most

        keys = to_heads(jnp.moveaxis(keys, 2, 1), salience.shape[1]).astype(jnp.float32)
        return jax.vmap(jax.vmap(of_head, (0, 0, None)))(salience, keys, units)
