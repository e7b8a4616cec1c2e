"""MInference: prompts are read along sparse patterns, one per head (Jiang et al. 2024, arXiv:2407.02490)."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.caches.patterns import PATTERNS, Pattern, read_patterns
from layers.caches.selecting import among_best
from layers.caches.sparse_prompt import SparsePrefill, check_positions
from layers.caches.state import View
from layers.kernels.attention import Mask
from layers.options import Count, checked_dataclass
from layers.parts.cache import Cache
from layers.segments import Visit
from layers.typing import Array, Bool, Float, Int


@checked_dataclass
class MInference(SparsePrefill):
    """MInference: prompts are read along sparse patterns, one per head (Jiang et al. 2024, arXiv:2407.02490).

        a_shape(m, n)         the first m tokens, and those at a distance below n
        vertical_slash(m, n)  the m columns j of largest sum_i p_ij and the n diagonals d of largest sum_i p_{i,i-d}, over the last
                              `window` queries i; `first` columns and `near` diagonals are always among them
        block_sparse(m, 0)    for each block of queries, the m blocks of keys of largest mean(q) . mean(k), and its own

    per query head, in blocks of `block` positions but for columns. A call on several tokens reads so, and its last queries choose for
    all; a call on one token reads everything, and all keys stay. A prompt that is read in several calls is one prompt per call. The
    rows of `heads` are found by `seqmodels.sparse_prefill.search`.

    Attributes:
      heads: a pattern [name, m, n] per layer with a cache and query head, in order; a JSON file or nested lists. If None,
        vertical_slash(verticals, slashes) for all.
      verticals, slashes: numbers of columns and diagonals if `heads` is None.
      block: positions in a block of queries or keys.
      window: number of last queries.
      first, near: columns and diagonals that are always among the chosen.
    """

    heads: Any = None
    verticals: int = 1000
    slashes: int = 6096
    block: int = 64
    window: int = 64
    first: Count = 30
    near: Count = 100

    def __post_init__(self) -> None:
        if self.heads is not None:
            object.__setattr__(self, "heads", read_patterns("heads", self.heads))

    def check(self, total: int, layers: Mapping[int, Any]) -> None:
        check_positions("minference", layers)
        if self.heads is None:
            return
        if len(self.heads) != len(layers):
            raise ValueError(
                f"heads of the cache 'minference' has {len(self.heads)} layers; expected {len(layers)}, the layers "
                f"{', '.join(map(str, layers))} of the model, which have a cache"
            )
        for patterns, (layer, config) in zip(self.heads, layers.items(), strict=True):
            if len(patterns) != config.heads:
                raise ValueError(
                    f"heads of the cache 'minference' has {len(patterns)} patterns for layer {layer}; expected {config.heads}, its query "
                    "heads"
                )

    def patterns(self, place: int, heads: int) -> tuple[Pattern, ...]:
        """Returns the pattern of each query head of a layer."""
        default = (("vertical_slash", self.verticals, self.slashes),) * heads
        return default if self.heads is None else self.heads[place]

    def mask(self, place: int, view: View, q: Float[Array, "b t h k"], cache: Cache, visit: Visit) -> Mask:
        patterns = self.patterns(place, q.shape[2])
        blocks, columns = self.chosen(patterns, view, q, cache, visit)
        most = max([m for name, m, _ in patterns if name == "vertical_slash"], default=0)
        found, index = jax.lax.top_k(columns.astype(jnp.int32), min(most, columns.shape[2]))
        return Mask(
            block_indices=self.lists(patterns, blocks),
            block_size=self.block,
            global_keys=jnp.where(found > 0, index, -1) if most else None,
        )

    def chosen(
        self,
        patterns: Sequence[Pattern],
        view: View,
        q: Float[Array, "b t h k"],
        cache: Cache,
        visit: Visit,
    ) -> tuple[Bool[Array, "b h i j"], Bool[Array, "b h s"]]:
        """Returns the blocks of keys that blocks of queries read, by position, and the columns that all queries read."""
        count = -(-cache.numbers.shape[1] // self.block)
        there = (cache.numbers != 0)[:, None]
        weights = self._weights(view, q, cache, visit)
        own = {name: np.array([one == name for one, *_ in patterns]) for name in PATTERNS}
        sizes = {name: np.array([m for _, m, _ in patterns]) * own[name] for name in PATTERNS}
        last = np.array([n for *_, n in patterns])
        columns = weights.sum(2)
        first = (cache.positions < self.first)[:, None] & there
        columns = among_best(
            jnp.where(there, jnp.where(first, jnp.inf, columns), -jnp.inf), sizes["vertical_slash"]
        )
        diagonals = self._diagonals(weights, cache, visit)
        offsets = self._blocks_of(among_best(diagonals, last * own["vertical_slash"]), count)
        # Blocks at a distance below a window, and those of the first tokens.
        number = np.arange(count)
        near = (number * self.block < last[:, None] + self.block - 1) & own["a_shape"][:, None]
        offsets |= near[None]
        distance = number[:, None] - number[None]
        blocks = offsets[..., np.abs(distance)]
        blocks |= (number[None] * self.block < sizes["a_shape"][:, None])[None, :, None]
        blocks |= self._liked(q, cache, visit, sizes["block_sparse"], own["block_sparse"], count)
        return blocks & (distance >= 0)[None, None], columns

    def _weights(self, view, q, cache, visit):
        """Returns the weights of attention of the last queries, (b, h, w, s)."""
        piece, held = slice(-self.window, None), (cache.numbers[..., None], cache.positions[..., None])
        bias = view.bias(visit.numbers[:, piece], visit.positions[:, piece], *held)
        return view.weights(q[:, piece], cache.entries[0], bias)

    def _diagonals(self, weights, cache, visit):
        """Returns the sums of the weights over diagonals, by distance, (b, h, s); -inf for those beyond the row."""
        slots = weights.shape[3]
        positions = visit.positions[:, -self.window :]
        distance = positions[..., None] - cache.positions[:, None]
        inside = jnp.where((distance >= 0) & (distance < slots), distance, slots)

        def over(weights, index):
            return jax.ops.segment_sum(weights.reshape(-1), index.reshape(-1), slots + 1)[:slots]

        sums = jax.vmap(jax.vmap(over, (0, None)))(weights, inside)
        number = jnp.arange(slots)[None, None]
        longest = visit.place.position[:, None, None]
        sums = jnp.where(number < self.near, jnp.inf, sums)
        return jnp.where(number < longest, sums, -jnp.inf)

    def _blocks_of(self, diagonals, count):
        """Returns at which distances, in blocks, there are blocks with a token of the chosen diagonals, (b, h, count)."""
        size = self.block
        diagonals = jnp.pad(diagonals, ((0, 0), (0, 0), (0, count * size - diagonals.shape[2])))
        # Diagonal d crosses the blocks at distances floor(d / size) and ceil(d / size).
        parts = diagonals.reshape(*diagonals.shape[:2], count, size)
        further = jnp.pad(parts[..., 1:].any(3), ((0, 0), (0, 0), (1, 0)))[..., :-1]
        return parts.any(3) | further

    def _liked(self, q, cache, visit, sizes, own, count):
        """Returns the blocks of keys whose mean is liked most by that of a block of queries, and its own, (b, h, i, j)."""
        if not own.any():
            return jnp.zeros((1, len(sizes), count, count), bool)
        keys = cache.entries[0]

        def means(x, numbers, positions):
            index = jnp.where(numbers != 0, positions // self.block, count)
            sums, number = (
                jax.vmap(lambda x, index: jax.ops.segment_sum(x, index, count + 1)[:count])(y, index)
                for y in (x.astype(jnp.float32), jnp.ones(index.shape))
            )
            return sums / jnp.maximum(number, 1.0)[..., None, None], number > 0

        q, _ = means(q, visit.numbers, visit.positions)
        k, there = means(keys, cache.numbers, cache.positions)
        grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
        likes = jnp.einsum("bigrk,bjgk->bgrij", grouped, k, precision=jax.lax.Precision.HIGHEST)
        likes = likes.reshape(len(q), len(sizes), count, count)
        number = np.arange(count)
        before = (number[None] <= number[:, None])[None] & there[:, None]
        chosen = among_best(jnp.where(before[:, None], likes, -jnp.inf), sizes[:, None])
        return (chosen | (number[None] == number[:, None])[None, None]) & own[None, :, None, None]

    def lists(self, patterns: Sequence[Pattern], blocks: Bool[Array, "b h i j"]) -> Int[Array, "b h i l"]:
        """Returns the blocks of keys that each block of queries reads, with -1 behind them."""
        most = 1
        for name, m, n in patterns:
            size = {
                "a_shape": -(-m // self.block) + -(-n // self.block) + 1,
                "vertical_slash": 2 * n,
                "block_sparse": m + 1,
            }[name]
            most = max(most, size)
        found, index = jax.lax.top_k(blocks.astype(jnp.int32), min(most, blocks.shape[3]))
        return jnp.where(found > 0, index, -1)
