"""DSA: every query attends to the tokens that a small scorer, the lightning indexer, likes best (arXiv:2512.02556)."""

import jax
import jax.numpy as jnp
from flax import nnx

from layers.adapters import in_training
from layers.kernels.attention import Logits, Tokens, attention
from layers.mixers.attention.attention import AttentionConfig
from layers.mixers.attention.patterned import Patterned, refuse_options
from layers.norms import LayerNorm, LayerNormConfig
from layers.options import NonNegative, checked_dataclass
from layers.parameters import AuxiliaryLoss, linear
from layers.parts.cache import Cache, empty_cache
from layers.parts.heads import split_heads
from layers.parts.position_blocks import some_at_a_time
from layers.segments import Segments
from layers.typing import Array, Bool, Float, Int

# Queries whose scores are held at once.
QUERIES = 128


@checked_dataclass
class DSAConfig(AttentionConfig):
    """Options of `DSA`, and those of `AttentionConfig` but for windows, sinks and biases of positions.

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

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_options(self, "dsa", ("window", "causal", "sink_logits"))
        if self.index_dim is not None and self.index_dim % 2:
            raise ValueError(f"index_dim={self.index_dim}; rotary positions need an even number")

    @property
    def index_size(self) -> int:
        """Features per head of the indexer."""
        return self.index_dim or self.size


class DSA(Patterned):
    """DSA: DeepSeek sparse attention, to tokens that a lightning indexer chooses (DeepSeek-AI 2025, arXiv:2512.02556).

        s_ij = sum_n w_in relu(q'_in . k'_j / sqrt(index_dim)),   q' = W_q' x,  k' = LayerNorm(W_k' x),  w = W_w x / sqrt(index_heads)
        T_i  = the top_k tokens j <= i of the largest s_ij,        q' and k' rotated by position
        y_i  = W_o softmax_{j in T_i}(q_i . k_j / sqrt(head_dim)) v_j                     per head, all heads with the same T_i

    The choice has no gradient. Training adds index_loss mean_i KL(p_i || softmax_{T_i}(s_i)), where p_i is the mean of the heads' weights;
    the loss trains the indexer alone, which reads x without a gradient to it. DeepSeek's layer chooses for latent attention
    (`mla`), and computes the scores in 8 bits. Every score and the choice as a mask over all tokens are computed here, some queries at a
    time, so that time is that of full attention and of the indexer. The cache holds all keys, values and keys of the indexer.
    """

    def __init__(self, config: DSAConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        size, options = config.index_size, {"bias": False, "dtype": config.dtype, "rngs": rngs}
        self.index_query = linear(config.width, config.index_heads * size, axes=("embed", "heads"), **options)
        self.index_key = linear(config.width, size, axes=("embed", None), **options)
        self.index_norm = LayerNorm(LayerNormConfig(size, dtype=config.dtype), rngs=rngs)
        self.index_weight = linear(config.width, config.index_heads, axes=("embed", "heads"), **options)
        self.auxiliary = AuxiliaryLoss(jnp.zeros((), jnp.float32))

    def initial(self, batch_size: int, max_length: int | None) -> Cache:
        config = self.config
        shapes = ((config.groups, config.size),) * 2 + ((1, config.index_size),)
        return empty_cache("dsa", batch_size, shapes, config.dtype, max_length=max_length)

    @property
    def kept(self) -> dict[str, int | None]:
        return {}

    def project(
        self, x: Float[Array, "b t d"], positions: Int[Array, "#b t"], segments: Segments | None
    ) -> tuple[tuple[Array, Array, Array], Array, Array, Array]:
        """Returns queries with those of the indexer and their weights; keys, values and keys of the indexer."""
        q, k, v = super().project(x, positions, segments)
        x, heads = jax.lax.stop_gradient(x), self.config.index_heads
        index_q = self.position.rotate(split_heads(self.index_query(x), heads), positions)
        index_k = self.position.rotate(self.index_norm(self.index_key(x))[:, :, None], positions)
        return (q, index_q, heads**-0.5 * self.index_weight(x)), k, v, index_k

    def attend(self, q, entries, here, there, given):
        config, (k, v, index_k), (numbers, positions) = self.config, entries, there

        def attend(q, index_q, weight, q_numbers, q_positions):
            _, seen = self._choose(index_q, weight, index_k, (q_numbers, q_positions), there)
            return attention(
                *(q, k, v),
                logits=Logits(bias=jnp.where(seen, 0.0, -jnp.inf)[:, None], logit_cap=config.logit_cap),
                scale=config.scale,
                causal=True,
                segment_ids=q_numbers,
                tokens=Tokens(numbers, q_positions, positions),
            )

        if in_training():
            real = here[0] != 0
            loss = jnp.where(real, self._divergence(q, entries, here, there), 0).sum()
            self.auxiliary[...] = config.index_loss * loss / jnp.maximum(real.sum(dtype=jnp.float32), 1)
        return some_at_a_time(attend, QUERIES, *q, *here)

    def _choose(
        self, q: Array, weight: Array, k: Array, here: tuple[Array, Array], there: tuple[Array, Array]
    ) -> tuple[Float[Array, "b t s"], Bool[Array, "b t s"]]:
        """Returns the scores of the indexer, and the tokens that each query sees."""
        (q_numbers, q_positions), (numbers, positions) = here, there
        highest = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
        products = jax.nn.relu(
            self.config.index_size**-0.5 * jnp.einsum("btnk,bsk->btns", q, k[:, :, 0], **highest)
        )
        scores = jnp.einsum("btns,btn->bts", products, weight.astype(jnp.float32), **highest)
        seen = (numbers[:, None] == q_numbers[..., None]) & (q_numbers != 0)[..., None]
        seen &= positions[:, None] <= q_positions[..., None]
        ranked = jnp.where(seen, jax.lax.stop_gradient(scores), -jnp.inf)
        _, best = jax.lax.top_k(ranked, min(self.config.top_k, k.shape[1]))
        rows, queries = (jnp.arange(size, dtype=jnp.int32) for size in best.shape[:2])
        chosen = jnp.zeros(seen.shape, bool).at[rows[:, None, None], queries[None, :, None], best].set(True)
        return scores, seen & chosen

    def _divergence(self, q, entries, here, there):
        """Returns KL(p || softmax(s)) over what each query sees, (b, t), in which p has no gradient."""
        k, _, index_k = entries

        def divergence(q, index_q, weight, q_numbers, q_positions):
            scores, seen = self._choose(index_q, weight, index_k, (q_numbers, q_positions), there)
            bias = jnp.where(seen, 0.0, -jnp.inf)[:, None].repeat(q.shape[2], axis=1)
            p = jax.lax.stop_gradient(self.view().weights(q, k, bias).mean(1))
            scores = jnp.where(seen, scores, 0)
            top = scores.max(-1, keepdims=True)
            total = jnp.where(seen, jnp.exp(scores - top), 0).sum(-1, keepdims=True)
            ratio = jnp.log(jnp.where(p > 0, p, 1)) - (scores - top - jnp.log(jnp.where(total > 0, total, 1)))
            return jnp.where(p > 0, p * ratio, 0).sum(-1)

        return some_at_a_time(divergence, QUERIES, *q, *here)
