"""LongHeads: each head reads the chunks of a prompt that it likes best (Lu et al. 2024, arXiv:2402.10685)."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from layers.caches.kept import Kept
from layers.caches.prompt import Prompt
from layers.caches.selecting import Selecting, among_best, everything, places
from layers.caches.state import CacheState, View
from layers.options import checked_dataclass
from layers.parts.cache import Cache, empty_cache, extend
from layers.segments import Visit
from layers.typing import Array, Bool, Float


@checked_dataclass
class LongHeads(Selecting):
    """LongHeads: each head reads the chunks of the prompt that it likes best (Lu et al. 2024, arXiv:2402.10685).

        m_c = mean_{i in c} sum_{j in c} softmax_j(scale q_i . k_j) v_j
        r_c = sum_{j in c} softmax_j(m_c . k_j / sqrt(k)) k_j,    keys rotated by their place in the chunk
        q reads the first chunk, the budget // chunk - 2 chunks c of largest q . r_c, q not rotated, and the last chunk

    per query head, where chunks are `chunk` tokens of the prompt, and all tokens see each other in m. The last chunk is that which the
    prompt ends in, and new tokens are read with it. Positions are true ones, where the paper numbers the chosen chunks anew.

    Attributes:
      budget: tokens that are chosen of the prompt, the first and the last chunk included; a multiple of `chunk`.
      chunk: tokens in a chunk.
    """

    budget: int = 2048
    chunk: int = 256

    def __post_init__(self) -> None:
        if self.budget % self.chunk or self.budget < 2 * self.chunk:
            raise ValueError(
                f"budget={self.budget} of the cache 'longheads' with chunk={self.chunk}; expected a multiple of the chunk, and at least "
                "the first and the last one"
            )

    def check(self, total: int, layers: Mapping[int, Any]) -> None:
        super().check(total, layers)
        for layer, config in layers.items():
            if config.sink_logits:
                raise ValueError(
                    f"sink_logits=True of layer {layer} does not fit the cache 'longheads', whose chunks have no sink; expected False"
                )

    def first_scores(self, cache: Cache, heads: int) -> Cache:
        b, slots, _, width = cache.entries[0].shape
        return empty_cache("longheads", b, ((heads, width),), cache.entries[0].dtype, max_length=slots)

    def scored(self, scores: Any, view: View, q: Array, cache: Cache, visit: Visit) -> Cache:
        # The queries of all tokens of the prompt, in the slots of their keys.
        return extend(scores, (q,), visit)[0]

    def compressed(
        self, prompts: Sequence[Prompt], views: Sequence[View], *, room: int, call: int = 1, **_: Any
    ) -> list[CacheState]:
        return [
            # New tokens are not old.
            everything(
                prompt,
                room,
                extra={"old": jnp.ones(prompt.keys.shape[:3], bool)},
                held=dict(features=self.features(prompt, view)),
            )
            for prompt, view in zip(prompts, views, strict=True)
        ]

    def features(self, prompt: Prompt, view: View) -> Float[Array, "b c h k"]:
        """Returns r of each chunk."""
        size, slots = self.chunk, prompt.slots
        count = -(-slots // size)
        live, heads = prompt.live, prompt.queries.shape[2]
        # Tokens of the current segment in order, from the first slot on.
        order = jnp.argsort(~live, axis=1, stable=True)
        there = jnp.arange(slots)[None] < live.sum(1)[:, None]

        def chunks(x):
            x = jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)
            x = jnp.pad(x, [(0, count * size - slots if axis == 1 else 0) for axis in range(x.ndim)])
            x = x.reshape(x.shape[0], count, size, *x.shape[2:]).astype(jnp.float32)
            return jnp.repeat(x, heads // x.shape[3], axis=3)

        keys, values, queries = map(chunks, (prompt.keys, prompt.values, prompt.scores.entries[0]))
        there = jnp.pad(there, ((0, 0), (0, count * size - slots))).reshape(-1, count, size)
        # Chunks without a token get finite numbers, and are never chosen.
        hidden = jnp.where(there, 0.0, -1e30)[:, :, None, None]
        scale = keys.shape[-1] ** -0.5 if view.scale is None else view.scale
        high = dict(precision=jax.lax.Precision.HIGHEST)
        weights = jax.nn.softmax(scale * jnp.einsum("bcihk,bcjhk->bchij", queries, keys, **high) + hidden)
        means = jnp.einsum("bchij,bcjhv->bcihv", weights, values, **high)
        seen = there[..., None, None]
        means = jnp.where(seen, means, 0.0).sum(2) / jnp.maximum(seen.sum(2), 1).astype(jnp.float32)
        # Keys are turned back to their place in the chunk.
        back = jnp.broadcast_to(-size * jnp.arange(count, dtype=jnp.int32)[None, :, None], there.shape)
        flat = keys.reshape(len(keys), count * size, *keys.shape[3:])
        keys = view.position.turn(flat, back.reshape(len(keys), -1)).reshape(keys.shape)
        products = jnp.einsum("bchk,bcjhk->bchj", means, keys, **high) * keys.shape[-1] ** -0.5
        weights = jax.nn.softmax(products + hidden[:, :, 0])
        return jnp.einsum("bchj,bcjhk->bchk", weights, keys, **high)

    def read(
        self, kept: Kept, view: View, q: Float[Array, "b t h k"], bias: Float[Array, "b h t n"]
    ) -> Bool[Array, "b #h t n"]:
        features = kept.held["features"]
        _, positions, now = places(kept, bias)
        last = ((kept.begun - 1) // self.chunk)[:, None, None]
        plain = view.position.turn(q, -jnp.maximum(now[..., 0], 0)).astype(jnp.float32)
        likes = jnp.einsum("bthk,bchk->bhtc", plain, features, precision=jax.lax.Precision.HIGHEST)
        number = jnp.arange(features.shape[1])[None, None, None]
        likes = jnp.where((number > 0) & (number < last[..., None]), likes, -jnp.inf)
        chosen = among_best(likes, self.budget // self.chunk - 2)
        chunk = positions // self.chunk
        of_token = jnp.minimum(chunk, features.shape[1] - 1)[:, None]
        shape = (*chosen.shape[:3], of_token.shape[3])
        chosen = jnp.take_along_axis(chosen, jnp.broadcast_to(of_token, shape), axis=3)
        new = ~kept.extra["old"][:, None, :, 0]
        return chosen | ((chunk == 0) | (chunk >= last) | new)[:, None]
