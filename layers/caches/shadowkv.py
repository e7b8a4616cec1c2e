"""ShadowKV: keys of low rank, read by chunks whose landmarks a query likes (Sun et al. 2024, arXiv:2410.21465)."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from layers.caches.kept import Kept, keep
from layers.caches.low_rank import along, back, directions
from layers.caches.policy import CachePolicy
from layers.caches.prompt import Prompt
from layers.caches.selecting import among_best, to_heads
from layers.caches.state import CacheState, View, emptied
from layers.kernels.attention import attention_with_lse, compose
from layers.options import Count, checked_dataclass
from layers.parts.cache import Cache
from layers.segments import Visit
from layers.typing import Array, Bool, Float, Int


@checked_dataclass
class ShadowKV(CachePolicy):
    """ShadowKV: keys of low rank, read by chunks whose landmarks a query likes (Sun et al. 2024, arXiv:2410.21465).

        K ~ A V^T,   V the first `rank` right singular vectors of the keys of the prompt, all heads side by side, not rotated
        L_c = mean_{j in c} k_j,   query q reads the budget // chunk chunks c of largest max_heads softmax_c(q . L_c / sqrt(k))

    per key/value head, the largest of its query heads. Chunks are `chunk` tokens of the prompt; their keys are computed from A and
    rotated when they are read. Keys stay whole, and are read in any case, in the last `local` chunks and what follows them, in the
    `outliers` chunks of smallest min_{j in c} cos(k_j, L_c), and in new tokens. The paper keeps values in the memory of the host; here
    they stay on the device, and chunks that are not read are masked.

    Attributes:
      budget: tokens of the prompt that are chosen, a multiple of `chunk`.
      rank: number of singular vectors.
      chunk: tokens in a chunk.
      outliers: chunks that the landmark tells least of.
      local: last whole chunks that are read in any case.
    """

    budget: int = 2048
    rank: int = 160
    chunk: int = 8
    outliers: Count = 48
    local: Count = 4

    def __post_init__(self) -> None:
        if self.budget % self.chunk:
            raise ValueError(
                f"budget={self.budget} of the cache 'shadowkv' with chunk={self.chunk}; expected a multiple of the chunk"
            )

    def check(self, total: int, layers: Mapping[int, Any]) -> None:
        super().check(total, layers)
        for layer, config in layers.items():
            if self.rank > config.groups * config.size:
                raise ValueError(
                    f"rank={self.rank} of the cache 'shadowkv' is more than the {config.groups * config.size} features of the keys of "
                    f"layer {layer}; expected at most that"
                )

    def compressed(
        self, prompts: Sequence[Prompt], views: Sequence[View], *, room: int, call: int = 1, **_: Any
    ) -> list[CacheState]:
        return [self._shadow(prompt, view, room) for prompt, view in zip(prompts, views, strict=True)]

    def _shadow(self, prompt, view, room):
        """Returns the keys of a prompt in parts, and what stays whole with slots for new tokens."""
        (b, s, groups, width), live = prompt.keys.shape, prompt.live
        landmarks, whole, chunk = self.landmarks(prompt)
        plain = view.position.turn(prompt.keys, -prompt.cache.positions)
        flat = jnp.where(live[..., None], plain.reshape(b, s, groups * width), 0.0)
        basis = directions(flat, self.rank)
        most = min(s, (self.outliers + self.local + 1) * self.chunk)
        kept = keep(prompt, jnp.where(whole, jnp.inf, -jnp.inf), most, room)
        numbers = jnp.where(live[..., None] & ~whole, prompt.cache.numbers[..., None], 0)
        fields = along(flat, basis), basis, prompt.values, landmarks, chunk, numbers, prompt.cache.positions
        return Shadow(*fields, kept)

    def landmarks(
        self, prompt: Prompt
    ) -> tuple[Float[Array, "b c g k"], Bool[Array, "b s g"], Int[Array, "b s"]]:
        """Returns the landmark of each chunk, which tokens stay whole, and the chunk of each token."""
        (b, s, groups, _), positions, live = prompt.keys.shape, prompt.cache.positions, prompt.live
        count = -(-s // self.chunk)
        chunk = jnp.where(live, positions // self.chunk, count)
        number = jnp.maximum(prompt.length // self.chunk - self.local, 0)
        old = live & (chunk < number[:, None])
        keys = prompt.keys.astype(jnp.float32)

        def over(reduce, x):
            return jax.vmap(lambda x, index: reduce(x, index, count + 1)[:count])(x, chunk)

        means = over(jax.ops.segment_sum, keys) / self.chunk
        own = jnp.take_along_axis(means, jnp.minimum(chunk, count - 1)[..., None, None], axis=1)
        norms = jnp.linalg.norm(keys, axis=3) * jnp.linalg.norm(own, axis=3)
        cosine = (keys * own).sum(3) / jnp.maximum(norms, 1e-30)
        least = over(jax.ops.segment_min, jnp.where(old[..., None], cosine, jnp.inf))
        there = (jnp.arange(count)[None] < number[:, None])[..., None]
        # The smallest first.
        far = jnp.moveaxis(jnp.where(there, -least, -jnp.inf), 1, 2)
        outlier = jnp.moveaxis(among_best(far, self.outliers), 2, 1)
        index = jnp.broadcast_to(jnp.minimum(chunk, count - 1)[..., None], (b, s, groups))
        whole = live[..., None] & (~old[..., None] | jnp.take_along_axis(outlier, index, axis=1))
        return means, whole, chunk


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["parts", "basis", "values", "landmarks", "chunk", "numbers", "positions", "kept"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Shadow(CacheState):
    """Keys of a prompt along few directions, and tokens that stay whole.

    Attributes:
      parts: keys of the prompt along the directions, (b, s, r).
      basis: the directions, (b, f, r), of the features of all heads, not rotated.
      values: values of the prompt.
      landmarks: means of the rotated keys of chunks, (b, c, g, k).
      chunk: the chunk of each token, (b, s).
      numbers: segment of each token that is not whole per key/value head, (b, s, g); 0 for others.
      positions: positions of the tokens.
      kept: the tokens that are whole, and room for new ones.
    """

    parts: Any
    basis: Any
    values: Any
    landmarks: Any
    chunk: Any
    numbers: Any
    positions: Any
    kept: Kept

    @property
    def slots(self) -> int:
        return self.kept.slots

    def like(self, cache: Cache) -> "Shadow":
        return emptied(self, cache)

    def attend(
        self,
        view: View,
        q: Float[Array, "b t h k"],
        k: Float[Array, "b t g k"],
        v: Float[Array, "b t g v"],
        visit: Visit,
    ) -> tuple[Float[Array, "b t h v"], "Shadow"]:
        kept, beyond = self.kept.added(k, v, visit)
        (b, s, groups), width = self.numbers.shape, k.shape[3]
        keys = back(self.parts, self.basis).reshape(b, s, groups, width)
        keys = view.position.turn(keys, self.positions)
        positions = jnp.broadcast_to(self.positions[..., None], self.numbers.shape)
        bias = view.bias(visit.numbers, visit.positions, self.numbers, positions)
        bias = jnp.where(to_heads(self.chosen(q), q.shape[2]), bias, -jnp.inf)

        def piece(keys, values, bias, sinks):
            logits = dataclasses.replace(view.logits, bias=bias, sink_logits=sinks)
            return attention_with_lse(q, keys.astype(k.dtype), values, logits=logits, scale=view.scale)

        old = piece(keys, self.values, bias, None)
        bias = view.bias(visit.numbers, visit.positions, kept.numbers, kept.positions)
        new = piece(kept.keys, kept.values, bias, view.logits.sink_logits)
        o = compose(old, new).output.astype(v.dtype)
        return jnp.where(beyond[..., None, None], jnp.nan, o), dataclasses.replace(self, kept=kept)

    def chosen(self, q: Float[Array, "b t h k"]) -> Bool[Array, "b g t s"]:
        """Returns the tokens of the prompt in the chunks that each query chooses."""
        (b, t, h, width), (count, groups) = q.shape, self.landmarks.shape[1:3]
        policy = self.kept.policy
        there = jax.vmap(lambda x, index: jax.ops.segment_max(x, index, count + 1)[:count])(
            (self.numbers != 0).astype(jnp.int32), self.chunk
        )
        there = jnp.moveaxis(there > 0, 1, 2)[:, :, None, None]
        likes = jnp.einsum(
            "btgrk,bcgk->bgrtc",
            q.astype(jnp.float32).reshape(b, t, groups, h // groups, width),
            self.landmarks,
            precision=jax.lax.Precision.HIGHEST,
        )
        likes = jax.nn.softmax(likes * width**-0.5, axis=-1, where=there)
        likes = jnp.where(there[:, :, 0], likes.max(2), -jnp.inf)
        chosen = among_best(likes, policy.budget // policy.chunk)
        index = jnp.minimum(self.chunk, count - 1)[:, None, None]
        return jnp.take_along_axis(
            chosen, jnp.broadcast_to(index, (b, groups, t, self.numbers.shape[1])), axis=3
        )
