"""Shortformer's attention: positions in queries and keys alone, a cached subsequence (Press et al. 2021, arXiv:2012.15832)."""

import dataclasses

import jax.numpy as jnp

from layers.kernels.attention import compose
from layers.mixers.attention.patterned import Patterned, refuse_options
from layers.options import checked_dataclass
from layers.parts.attention_config import AttentionConfig
from layers.parts.cache import Cache, empty_cache
from layers.parts.grouped_attention import Grouped, grouped_attention
from layers.positions import sinusoidal
from layers.positions.position import NoPosition
from layers.segments import Segments
from layers.typing import Array, Float, Int


@checked_dataclass
class ShortformerConfig(AttentionConfig):
    """Options of `Shortformer`, and those of `AttentionConfig` but for windows, sinks and positions.

    Attributes:
      subsequence: n, tokens of a subsequence. The paper has 128 in its first stage of training and 512 in the second.
    """

    subsequence: int = 512
    position: str = "none"

    fixed = ("window", "causal")

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_options(self, "shortformer", positions=(NoPosition,))


class Shortformer(Patterned):
    """Position-infused attention to the own and the previous subsequence (Press et al. 2021, arXiv:2012.15832).

        q_i = W_q (x_i + p_{a(i)}),   v_j = W_v x_j,   k_ij = W_k (x_j + p_{a(j)}) or W_k (x_j + p_{j mod n})
        y_i = W_o sum_j softmax_j(q_i . k_ij / sqrt(head_dim)) v_j,   j <= i,  floor(j / n) >= floor(i / n) - 1

    with sinusoids p. Positions count from the first visible token: a(i) = n + i mod n, or i in the first subsequence, for tokens
    of the own subsequence, and j mod n for those of the previous one. Values carry no position, and the model adds none to its
    embeddings. Linear in t. The cache holds the last 2 n - 1 tokens, with the keys of both kinds.
    """

    def initial(self, batch_size: int, max_length: int | None) -> Cache:
        config = self.config
        shapes = ((config.groups, config.size),) * 3
        return empty_cache(
            "shortformer", batch_size, shapes, config.dtype, max_length=max_length, **self.kept
        )

    @property
    def kept(self) -> dict[str, int | None]:
        # The subsequence before, and the own one but for the query itself.
        return {"window": 2 * self.config.subsequence - 1}

    def project(
        self, x: Float[Array, "b t d"], positions: Int[Array, "#b t"], segments: Segments | None
    ) -> tuple[Array, Array, Array, Array]:
        """Returns queries, keys for the own subsequence and for the next one, and values."""
        n = self.config.subsequence
        inside = positions % n

        def infused(places):
            return x + sinusoidal(places, x.shape[2]).astype(x.dtype)

        q, own, v = self.heads(x, infused(jnp.where(positions < n, positions, n + inside)))
        _, before, _ = self.heads(x, infused(inside))
        return q, own, before, v

    def attend(self, q, entries, here, there, given):
        config = self.config
        own, before, v = entries
        q_at, k_at = (Grouped(*side, side[1] // config.subsequence) for side in (here, there))
        options = {"scale": config.scale, "logits": self.logits()}
        near = grouped_attention(q, own, v, q_at, k_at, given, reach=config.subsequence, **options)
        options["logits"] = dataclasses.replace(options["logits"], sink_logits=None)
        following = k_at._replace(groups=k_at.groups + 1)
        far = grouped_attention(q, before, v, q_at, following, given, reach=2 * config.subsequence, **options)
        return compose(near, far).output.astype(v.dtype)
