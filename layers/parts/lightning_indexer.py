"""The lightning indexer: a small scorer that chooses which tokens attention sees (DeepSeek-AI 2025, arXiv:2512.02556)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.adapters import in_training
from layers.caches.state import View
from layers.kernels.attention import Tokens, attention
from layers.norms import LayerNorm, LayerNormConfig
from layers.options import NonNegative
from layers.parameters import AuxiliaryLoss, linear
from layers.parts.heads import split_heads
from layers.parts.position_blocks import some_at_a_time
from layers.typing import Array, Bool, Float, Int

# Queries whose scores are held at once.
QUERIES = 128

Place = tuple[Int[Array, "b _t"], Int[Array, "b _t"]]


@dataclasses.dataclass(frozen=True)
class IndexerOptions:
    """Options of `LightningIndexer`, which a checked config of a mixer with `head_dim` inherits.

    Attributes:
      top_k: tokens that a query sees.
      index_heads: heads of the indexer, which share its keys.
      index_dim: features per head of the indexer; head_dim if None.
      index_loss: factor of the loss of the indexer in training.
    """

    top_k: int = 2048
    index_heads: int = 4
    index_dim: int | None = None
    index_loss: NonNegative = 1.0


class LightningIndexer(nnx.Module):
    """Scores tokens for each query, and attends to the best.

        s_ij = sum_n w_in relu(q'_in . k'_j / sqrt(index_dim)),   q' = W_q' u,  k' = LayerNorm(W_k' x),  w = W_w x / sqrt(index_heads)
        T_i  = the top_k tokens j <= i of the largest s_ij

    q' and k' are rotated by position; u is x or what the layer makes its queries from. The choice has no gradient. Training adds
    index_loss mean_i KL(p_i || softmax_{T_i}(s_i)), where p_i is the mean of the heads' weights in the layer. The loss trains the indexer
    alone, to whose inputs it has no gradient. Every score and the choice as a mask over all tokens are computed, some queries at a time.
    """

    def __init__(
        self, config: IndexerOptions, *, width: int, source: int, size: int, dtype: Any, rngs: nnx.Rngs
    ):
        """Makes the maps of an indexer.

        Args:
          config: its options.
          width: features of x.
          source: features of u.
          size: features per head of the indexer.
          dtype: type of activations.
        """
        self.config, self.size = config, size
        options = {"bias": False, "dtype": dtype, "rngs": rngs}
        axes = ("embed" if source == width else None, "heads")
        self.query = linear(source, config.index_heads * size, axes=axes, **options)
        self.key = linear(width, size, axes=("embed", None), **options)
        self.norm = LayerNorm(LayerNormConfig(size, dtype=dtype), rngs=rngs)
        self.weight = linear(width, config.index_heads, axes=("embed", "heads"), **options)
        self.auxiliary = AuxiliaryLoss(jnp.zeros((), jnp.float32))

    def project(
        self,
        x: Float[Array, "b t d"],
        u: Float[Array, "b t u"],
        turn: Callable[[Float[Array, "b t h k"]], Float[Array, "b t h k"]],
    ) -> tuple[Float[Array, "b t n _e"], Float[Array, "b t n"], Float[Array, "b t 1 _e"]]:
        """Returns queries of the indexer, the weights of its heads, and its keys; `turn` rotates heads by position."""
        x, u = jax.lax.stop_gradient((x, u))
        heads = self.config.index_heads
        q, k = split_heads(self.query(u), heads), self.norm(self.key(x))[:, :, None]
        return turn(q), heads**-0.5 * self.weight(x), turn(k)

    def attend(
        self,
        view: View,
        own: tuple[Float[Array, "b t n _e"], Float[Array, "b t n"], Float[Array, "b s 1 _e"]],
        q: Float[Array, "b t h k"],
        k: Float[Array, "b s g k"],
        v: Float[Array, "b s g v"],
        here: Place,
        there: Place,
    ) -> Float[Array, "b t h v"]:
        """Returns the attention of queries q to the chosen tokens, and in training writes the loss of the indexer.

        Args:
          view: how the queries of the layer weigh its keys.
          own: what `project` gives, with the keys of all tokens.
          q, k, v: queries, keys and values of the layer.
          here, there: numbers of the segments, 0 for none, and positions of queries and keys.
        """
        *queries, keys = own
        numbers, positions = there

        def attend(q, index_q, weight, q_numbers, q_positions):
            _, seen = self._choose(index_q, weight, keys, (q_numbers, q_positions), there)
            return attention(
                *(q, k, v),
                logits=dataclasses.replace(view.logits, bias=jnp.where(seen, 0.0, -jnp.inf)[:, None]),
                scale=view.scale,
                causal=True,
                segment_ids=q_numbers,
                tokens=Tokens(numbers, q_positions, positions),
            )

        def divergence(q, index_q, weight, q_numbers, q_positions):
            scores, seen = self._choose(index_q, weight, keys, (q_numbers, q_positions), there)
            bias = jnp.where(seen, 0.0, -jnp.inf)[:, None].repeat(q.shape[2], axis=1)
            p = jax.lax.stop_gradient(view.weights(q, k, bias).mean(1))
            return _divergence(p, scores, seen)

        if in_training():
            real = here[0] != 0
            loss = jnp.where(real, some_at_a_time(divergence, QUERIES, q, *queries, *here), 0).sum()
            self.auxiliary[...] = self.config.index_loss * loss / jnp.maximum(real.sum(dtype=jnp.float32), 1)
        return some_at_a_time(attend, QUERIES, q, *queries, *here)

    def _choose(
        self, q: Array, weight: Array, k: Array, here: Place, there: Place
    ) -> tuple[Float[Array, "b t s"], Bool[Array, "b t s"]]:
        """Returns the scores, and the tokens that each query sees."""
        (q_numbers, q_positions), (numbers, positions) = here, there
        highest = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
        products = jax.nn.relu(self.size**-0.5 * jnp.einsum("btnk,bsk->btns", q, k[:, :, 0], **highest))
        scores = jnp.einsum("btns,btn->bts", products, weight.astype(jnp.float32), **highest)
        seen = (numbers[:, None] == q_numbers[..., None]) & (q_numbers != 0)[..., None]
        seen &= positions[:, None] <= q_positions[..., None]
        ranked = jnp.where(seen, jax.lax.stop_gradient(scores), -jnp.inf)
        _, best = jax.lax.top_k(ranked, min(self.config.top_k, k.shape[1]))
        rows, queries = (jnp.arange(size, dtype=jnp.int32) for size in best.shape[:2])
        chosen = jnp.zeros(seen.shape, bool).at[rows[:, None, None], queries[None, :, None], best].set(True)
        return scores, seen & chosen


def _divergence(
    p: Float[Array, "b t s"], scores: Float[Array, "b t s"], seen: Bool[Array, "b t s"]
) -> Float[Array, "b t"]:
    """Returns KL(p || softmax(scores)) over what each query sees."""
    scores = jnp.where(seen, scores, 0)
    top = scores.max(-1, keepdims=True)
    total = jnp.where(seen, jnp.exp(scores - top), 0).sum(-1, keepdims=True)
    ratio = jnp.log(jnp.where(p > 0, p, 1)) - (scores - top - jnp.log(jnp.where(total > 0, total, 1)))
    return jnp.where(p > 0, p * ratio, 0).sum(-1)
