"""What a search of sparse attention looks at: attention with numbers added to its logits, to see what they do to a loss."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from layers.caches.policy import CachePolicy
from layers.caches.state import CacheState, View
from layers.kernels.attention import attention
from layers.options import checked_dataclass
from layers.parts.cache import Cache
from layers.segments import Visit
from layers.typing import Array, Float


@checked_dataclass
class Perturbing(CachePolicy):
    """Attention of whole rows in one call, to whose logits `Perturbed.added` is added."""

    compresses = False

    def begin(self, cache: Cache, heads: int, place: int) -> CacheState:
        b, slots = cache.numbers.shape
        none = jnp.zeros((b, heads, slots, slots), jnp.float32)
        return Perturbed(none, none)


@partial(jax.tree_util.register_dataclass, data_fields=["added", "weights"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Perturbed(CacheState):
    """What is added to the logits of a row.

    Attributes:
      added: (b, h, t, t), of queries and keys.
      weights: the weights of attention (b, h, t, t), after the row was read.
    """

    added: Any
    weights: Any

    @property
    def slots(self) -> int:
        return self.added.shape[3]

    def like(self, cache: Cache) -> CacheState:
        return Perturbing().begin(cache, self.added.shape[1], 0)

    def attend(
        self,
        view: View,
        q: Float[Array, "b t h k"],
        k: Float[Array, "b t g k"],
        v: Float[Array, "b t g v"],
        visit: Visit,
    ) -> tuple[Float[Array, "b t h v"], "Perturbed"]:
        numbers, positions = visit.numbers, visit.positions
        bias = view.bias(numbers, positions, numbers[..., None], positions[..., None]) + self.added
        logits = dataclasses.replace(view.logits, bias=bias)
        o = attention(q, k, v, logits=logits, scale=view.scale)
        return o, dataclasses.replace(self, weights=view.weights(q, k, bias))
