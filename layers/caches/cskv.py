"""CSKV: keys and values of few channels, beside a window of whole ones (Wang et al. 2024, arXiv:2409.10593)."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from layers.caches.low_rank import along, back, directions
from layers.caches.policy import CachePolicy
from layers.caches.prompt import Prompt
from layers.caches.state import CacheState, View, emptied
from layers.kernels.attention import attention_with_lse, compose
from layers.options import UnitInterval, checked_dataclass
from layers.parameters import Linear
from layers.parts.cache import Cache, empty_cache, extend
from layers.segments import Place, Visit
from layers.typing import Array, Float


@checked_dataclass
class CSKV(CachePolicy):
    """CSKV: keys and values of few channels, beside a window of whole ones (Wang et al. 2024, arXiv:2409.10593).

        W_K ~ A_K V_K^T,   c_j = A_K^T x_j = V_K^T (k_j - b_K),   k_j ~ V_K c_j + b_K,   values alike
        V the first round(share f) right singular vectors of a projection (d, f) to the f features of all heads

    Queries read the last `window` tokens as they are and all others by c, whose keys are expanded and rotated in every step. The prompt
    is read whole. The factors are those of the singular value decomposition; the paper weighs channels by the sizes of their inputs,
    and trains the factors to restore keys and values.

    Attributes:
      keys, values: share of the channels of keys and of values that are kept.
      window: number of last tokens, the query's own included, that are kept whole.
    """

    keys: UnitInterval = 0.5
    values: UnitInterval = 0.5
    window: int = 32

    def __post_init__(self) -> None:
        for name in ("keys", "values"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name}=0.0 of the cache 'cskv' keeps no channel; expected more than 0")

    def check(self, total: int, layers: Mapping[int, Any]) -> None:
        for layer, config in layers.items():
            for name, changes in (("qk_norm", config.qk_norm), ("key_scale", config.key_scale != 1)):
                if changes:
                    raise ValueError(
                        f"{name}={getattr(config, name)} of layer {layer} does not fit the cache 'cskv': its keys are not W_K x + b_K; "
                        "expected a model without it"
                    )

    def compressed(
        self, prompts: Sequence[Prompt], views: Sequence[View], *, room: int, call: int = 1, **_: Any
    ) -> list[CacheState]:
        return [self._narrow(prompt, view, room) for prompt, view in zip(prompts, views, strict=True)]

    def _narrow(self, prompt, view, room):
        """Returns the tokens of a prompt by few channels, and the last ones as they are."""
        b, slots, groups, width = prompt.keys.shape
        bases, shares = [], (self.keys, self.values)
        for projection, share in zip(view.projections, shares, strict=True):
            basis = directions(projection.matrix, max(1, round(share * groups * width)))
            bases.append(jnp.broadcast_to(basis[None], (b, *basis.shape)))
        numbers, positions = prompt.cache.numbers, prompt.cache.positions
        place = Place(numbers.max(1), numbers.max(1), prompt.length)
        visit = Visit(jnp.ones(b, bool), numbers, positions, place)
        sizes = ((groups, width),) * 2
        codes = tuple(basis.shape[2:] for basis in bases)
        empty = Narrow(
            empty_cache("cskv", b, codes, jnp.float32, max_length=slots + room),
            empty_cache("cskv", b, sizes, prompt.keys.dtype, max_length=None, window=self.window),
            *bases,
            self,
        )
        return empty.extended(view, prompt.keys, prompt.values, visit)[0]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "recent", "key_basis", "value_basis"],
    meta_fields=["policy"],
)
@dataclasses.dataclass(frozen=True)
class Narrow(CacheState):
    """All tokens by few channels of their keys and values, and the last ones as they are.

    Attributes:
      codes: c of keys (b, s, r) and of values.
      recent: the last tokens.
      key_basis, value_basis: V (b, f, r), the same in all rows.
    """

    codes: Cache
    recent: Cache
    key_basis: Any
    value_basis: Any
    policy: CSKV

    @property
    def slots(self) -> int:
        return self.codes.numbers.shape[1]

    def like(self, cache: Cache) -> "Narrow":
        return emptied(self, cache)

    def extended(
        self, view: View, k: Float[Array, "b t g k"], v: Float[Array, "b t g v"], visit: Visit
    ) -> tuple["Narrow", Any, Any]:
        """Returns the state with new tokens, the last tokens as queries may see them, and which tokens found no slot."""
        plain = view.position.turn(k, -visit.positions), v
        codes = tuple(
            along(x.reshape(*x.shape[:2], -1) - _bias(projection), basis)
            for x, projection, basis in zip(
                plain, view.projections, (self.key_basis, self.value_basis), strict=True
            )
        )
        codes, _, beyond = extend(self.codes, codes, visit)
        recent, seen, _ = extend(self.recent, (k, v), visit, window=self.policy.window)
        return dataclasses.replace(self, codes=codes, recent=recent), seen, beyond

    def attend(
        self,
        view: View,
        q: Float[Array, "b t h k"],
        k: Float[Array, "b t g k"],
        v: Float[Array, "b t g v"],
        visit: Visit,
    ) -> tuple[Float[Array, "b t h v"], "Narrow"]:
        made, seen, beyond = self.extended(view, k, v, visit)
        codes, groups = made.codes, k.shape[2]
        keys, values = (
            (back(part, basis) + _bias(projection)).reshape(*part.shape[:2], groups, -1).astype(v.dtype)
            for part, basis, projection in zip(
                codes.entries, (self.key_basis, self.value_basis), view.projections, strict=True
            )
        )
        keys = view.position.turn(keys, codes.positions)

        def piece(keys, values, numbers, positions, sinks, far):
            bias = view.bias(visit.numbers, visit.positions, numbers[..., None], positions[..., None])
            outside = visit.positions[..., None] - positions[:, None] >= self.policy.window
            bias = jnp.where((outside == far)[:, None], bias, -jnp.inf)
            logits = dataclasses.replace(view.logits, bias=bias, sink_logits=sinks)
            return attention_with_lse(q, keys, values, logits=logits, scale=view.scale)

        old = piece(keys, values, codes.numbers, codes.positions, None, True)
        near = piece(*seen.entries, seen.numbers, seen.positions, view.logits.sink_logits, False)
        o = compose(old, near).output.astype(v.dtype)
        return jnp.where(beyond[..., None, None], jnp.nan, o), made


def _bias(projection: Linear) -> Float[Array, "1 1 f"] | float:
    """Returns what a projection adds."""
    return 0.0 if projection.bias is None else projection.bias[...][None, None]
