"""DSA: every query attends to the tokens that a small scorer, the lightning indexer, likes best (arXiv:2512.02556)."""

from flax import nnx

from layers.mixers.attention.patterned import Patterned, refuse_options
from layers.options import checked_dataclass
from layers.parts.attention_config import AttentionConfig
from layers.parts.cache import Cache, empty_cache
from layers.parts.lightning_indexer import IndexerOptions, LightningIndexer
from layers.segments import Segments
from layers.typing import Array, Float, Int


@checked_dataclass
class DSAConfig(IndexerOptions, AttentionConfig):
    """Options of `DSA`, and those of `AttentionConfig` but for windows, sinks and biases of positions.

    Attributes:
      top_k, index_heads, index_dim, index_loss: those of `IndexerOptions`.
    """

    fixed = ("window", "causal", "sink_logits")

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_options(self, "dsa")
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

    `LightningIndexer` says how the indexer is trained. DeepSeek's layer chooses for latent attention, which is `sparse_mla`, and computes
    the scores in 8 bits. Every score is computed here, so that time is that of full attention and of the indexer. The cache holds all
    keys, values and keys of the indexer.
    """

    def __init__(self, config: DSAConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        sizes = {"width": config.width, "source": config.width, "size": config.index_size}
        self.indexer = LightningIndexer(config, **sizes, dtype=config.dtype, rngs=rngs)

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
        *own, index_k = self.indexer.project(x, x, lambda y: self.position.rotate(y, positions))
        return (q, *own), k, v, index_k

    def attend(self, q, entries, here, there, given):
        (q, *own), (k, v, index_k) = q, entries
        return self.indexer.attend(self.view(), (*own, index_k), q, k, v, here, there)
