"""Squeezed attention: keys of a prompt are read by clusters (Hooper et al. 2024, arXiv:2411.09688)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from layers.caches.kept import Kept
from layers.caches.prompt import Prompt
from layers.caches.selecting import Selecting, everything, to_heads
from layers.caches.state import CacheState, View
from layers.options import Count, UnitInterval, checked_dataclass
from layers.typing import Array, Bool, Float, Int


@checked_dataclass
class Squeezed(Selecting):
    """Squeezed attention: new tokens read the clusters of keys that matter to them (Hooper et al. 2024, arXiv:2411.09688).

        S_c = exp(scale q . C_c) / sum_c' N_c' exp(scale q . C_c'),    C_c the mean and N_c the number of the keys in cluster c
        query q reads the keys of the prompt in clusters with S_c >= T, its last `window` tokens, and new tokens

    per query head. Keys of each key/value head are clustered at the end of the prompt, without the window, by k-means on keys of norm 1
    that starts from keys at equal distances. T is the quantile `sparsity`, over all keys of the row in all layers and heads, of the
    means of S over the queries of the window. The paper clusters a prefix beforehand and has a second level of clusters.

    Attributes:
      sparsity: share of the keys that queries of the window would leave out, on average; 0 leaves out none.
      clusters: number of clusters as a share of the keys.
      window: number of last tokens of the prompt that are read in any case.
      iterations: steps of k-means.
    """

    sparsity: UnitInterval = 0.7
    clusters: UnitInterval = 0.05
    window: int = 100
    iterations: Count = 10

    @property
    def observed(self) -> int:
        return self.window

    def budgets(self, prompts: Sequence[Prompt], views: Sequence[View]) -> list[Int[Array, "b 1"]]:
        return [self.number(prompt)[:, None] for prompt in prompts]

    def number(self, prompt: Prompt) -> Int[Array, "b"]:
        """Returns the number of clusters of each row, at least one."""
        old = jnp.maximum(prompt.length - self.window, 0).astype(jnp.float32)
        return jnp.maximum(jnp.floor(self.clusters * old + 1e-3).astype(jnp.int32), 1)

    def compressed(
        self,
        prompts: Sequence[Prompt],
        views: Sequence[View],
        *,
        room: int,
        call: int = 1,
        counts: Sequence[int] | None = None,
        **_: Any,
    ) -> list[CacheState]:
        counts = [prompt.slots for prompt in prompts] if counts is None else counts
        made = [self.clustered(*each) for each in zip(prompts, counts, strict=True)]
        threshold = self.threshold(prompts, views, made)
        return [
            # Cluster 0 is that of all tokens that are read in any case, new ones among them.
            everything(
                prompt,
                room,
                extra={"cluster": jnp.moveaxis(labels, 1, 2) + 1},
                held=dict(centroids=centroids, sizes=sizes, threshold=threshold),
            )
            for prompt, (labels, centroids, sizes) in zip(prompts, made, strict=True)
        ]

    def clustered(
        self, prompt: Prompt, count: int
    ) -> tuple[Int[Array, "b g s"], Float[Array, "b c g k"], Int[Array, "b c g"]]:
        """Returns the cluster of each key, -1 where it has none, the mean keys of `count` clusters, and their sizes."""
        old = prompt.live & ~prompt.recent(self.window)
        per_head = jax.vmap(k_means, (1, None, None, None, None), (0, 1, 1))
        return jax.vmap(per_head, (0, 0, 0, None, None))(
            prompt.keys.astype(jnp.float32), old, self.number(prompt), count, self.iterations
        )

    def threshold(
        self, prompts: Sequence[Prompt], views: Sequence[View], made: Sequence[Any]
    ) -> Float[Array, "b"]:
        """Returns T of each row."""
        scores = []
        for prompt, view, (labels, centroids, sizes) in zip(prompts, views, made, strict=True):
            asked = (prompt.query_numbers != 0)[:, None, :, None]
            weights = jnp.where(asked, self.weights(view, prompt.queries, centroids, sizes), 0.0).sum(2)
            means = weights / jnp.maximum(asked.sum((1, 2, 3)), 1).astype(jnp.float32)[:, None, None]
            labels = to_heads(labels, means.shape[1])
            scores.append(jnp.where(labels >= 0, of_clusters(means, labels), jnp.nan).reshape(len(means), -1))
        found = jnp.nanquantile(jnp.concatenate(scores, axis=1), self.sparsity, axis=1)
        # Other queries may have smaller scores than those of the window.
        return jnp.where(jnp.isnan(found) | (self.sparsity == 0), 0.0, found)

    def weights(
        self,
        view: View,
        q: Float[Array, "b t h k"],
        centroids: Float[Array, "b c g k"],
        sizes: Int[Array, "b c g"],
    ) -> Float[Array, "b h t c"]:
        """Returns S; 0 for a cluster without keys."""
        size = to_heads(jnp.moveaxis(sizes, 2, 1), q.shape[2])[:, :, None].astype(jnp.float32)
        bias = jnp.broadcast_to(
            jnp.where(size > 0, 0.0, -jnp.inf), (*size.shape[:2], q.shape[1], size.shape[3])
        )
        products = view.products(q, centroids, bias)
        top = jnp.maximum(products.max(3, keepdims=True), jnp.finfo(jnp.float32).min)
        powers = jnp.exp(products - top)
        return powers / jnp.maximum((size * powers).sum(3, keepdims=True), 1e-30)

    def read(
        self, kept: Kept, view: View, q: Float[Array, "b t h k"], bias: Float[Array, "b h t n"]
    ) -> Bool[Array, "b #h t n"]:
        weights = self.weights(view, q, kept.held["centroids"], kept.held["sizes"])
        labels = to_heads(jnp.moveaxis(kept.extra["cluster"], 2, 1), q.shape[2])[:, :, None]
        enough = of_clusters(weights, labels - 1) >= kept.held["threshold"][:, None, None, None]
        return (labels == 0) | enough


def of_clusters(x: Float[Array, "... c"], labels: Int[Array, "... n"]) -> Float[Array, "... n"]:
    """Returns the number of each token's cluster; anything where it has none."""
    return jnp.take_along_axis(x, jnp.maximum(labels, 0), axis=-1)


def k_means(
    keys: Float[Array, "s k"], old: Bool[Array, "s"], number: Int[Array, ""], count: int, iterations: int
) -> tuple[Int[Array, "s"], Float[Array, "c k"], Int[Array, "c"]]:
    """Returns the cluster of each of the `old` keys, -1 for others, and the mean keys and sizes of `count` clusters.

    The first `number` of the clusters are used.
    """
    x = keys / jnp.maximum(jnp.linalg.norm(keys, axis=1, keepdims=True), 1e-30)
    index = jnp.arange(count)
    first = index * old.sum() // number
    # The old keys in their order.
    order = jnp.argsort(~old, stable=True)
    centres = x[order[jnp.minimum(first, len(x) - 1)]]

    def assigned(centres):
        near = x @ centres.T - jnp.square(centres).sum(1)[None] / 2
        labels = jnp.argmax(jnp.where(index[None] < number, near, -jnp.inf), axis=1)
        return jnp.where(old, labels, count).astype(jnp.int32)

    def total(x, labels):
        return jax.ops.segment_sum(x, labels, count + 1)[:count]

    def step(_, centres):
        labels = assigned(centres)
        sizes = total(old.astype(jnp.float32), labels)[:, None]
        return jnp.where(sizes > 0, total(x, labels) / jnp.maximum(sizes, 1.0), centres)

    labels = assigned(jax.lax.fori_loop(0, iterations, step, centres))
    sizes = total(old.astype(jnp.int32), labels)
    means = total(keys, labels) / jnp.maximum(sizes, 1)[:, None].astype(jnp.float32)
    return jnp.where(labels < count, labels, -1), means, sizes
