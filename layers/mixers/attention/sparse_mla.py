"""Sparse MLA: latent attention to the tokens that a lightning indexer chooses (DeepSeek-AI 2025, arXiv:2512.02556)."""

import jax.numpy as jnp
from flax import nnx

from layers.caches.state import View
from layers.kernels.attention import Logits
from layers.mixers.attention.mla import MLA, MLAConfig
from layers.options import checked_dataclass
from layers.parts.cache import Cache, empty_cache
from layers.parts.lightning_indexer import IndexerOptions, LightningIndexer
from layers.parts.position_blocks import numbers_and_positions
from layers.typing import Array, Float, Int


@checked_dataclass
class SparseMLAConfig(IndexerOptions, MLAConfig):
    """Options of `SparseMLA`, and those of `MLAConfig`. DeepSeek-V3.2 has 64 heads of 128 features in the indexer.

    Attributes:
      top_k, index_heads, index_dim, index_loss: those of `IndexerOptions`. The first `rope_dim` of the index_dim features are rotated.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.index_size < self.rope_dim:
            raise ValueError(
                f"index_dim={self.index_size} with rope_dim={self.rope_dim}; expected at least rope_dim, "
                "as many features of the indexer are rotated"
            )

    @property
    def index_size(self) -> int:
        """Features per head of the indexer."""
        return self.index_dim or self.head_dim


class SparseMLA(MLA):
    """Sparse MLA: multi-head latent attention to the tokens T_i of a lightning indexer (DeepSeek-AI 2025, arXiv:2512.02556).

        y_i = W_o softmax_{j in T_i}((q_i . k_j + q_r,i . k_r,j) scale) v_j        with q, k, v and k_r of `MLA`

    T_i is what `LightningIndexer` chooses, the same tokens for all heads. Its queries are made from what those of the layer are made
    from, norm(W_a x) with `query_latent`, and its keys from x. The first rope_dim features of both are rotated by position, the
    others carry none. DeepSeek turns these vectors by a Hadamard matrix, which changes no product, and computes their products in 8 bits,
    which is left out. Time is that of full latent attention and of the indexer.

    The cache holds latent + rope_dim numbers per token and the key of the indexer, index_dim more. It has `max_length` slots, and outputs
    of later tokens are NaN.
    """

    def __init__(self, config: SparseMLAConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        sizes = {"width": config.width, "source": config.query_latent or config.width}
        self.indexer = LightningIndexer(
            config, **sizes, size=config.index_size, dtype=config.dtype, rngs=rngs
        )

    def initial(self, batch_size: int, max_length: int | None) -> Cache:
        config = self.config
        shapes = ((config.latent,), (config.rope_dim,), (1, config.index_size))
        return empty_cache("sparse_mla", batch_size, shapes, config.dtype, max_length=max_length)

    def project(
        self, x: Float[Array, "b t d"], positions: Int[Array, "#b t"]
    ) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        source, rope = self.query_source(x), self.config.rope_dim

        def turn(y):
            return jnp.concatenate([self.turn(y[..., :rope], positions), y[..., rope:]], axis=-1)

        *own, index_k = self.indexer.project(x, source, turn)
        return (*self._queries(source, positions), *own), (*self._latents(x, positions), index_k)

    def attend(self, queries, entries, segment_ids, tokens=None):
        (q, q_turned, *own), (c, k_turned, index_k) = queries, entries
        q, k, v, outer = self.heads(q, q_turned, c, k_turned, cached=tokens is not None)
        if tokens is None:
            here = there = numbers_and_positions(c, segment_ids)
        else:
            here = (segment_ids, tokens.q_positions)
            there = (tokens.kv_segment_ids, tokens.kv_positions)
        view = View(None, Logits(), self.scale)
        return outer(self.indexer.attend(view, (*own, index_k), q, k, v, here, there))
