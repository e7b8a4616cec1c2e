"""Luna: attention packed into a few latents and unpacked again (Ma et al. 2021, arXiv:2106.01540)."""

import jax.numpy as jnp
from flax import nnx

from layers.kernels.attention import Tokens, attention
from layers.options import checked_dataclass
from layers.parameters import linear, parameter
from layers.parts.heads import join_heads, split_heads
from layers.parts.whole_attention import WholeAttention, WholeAttentionConfig, map_of, mapped


@checked_dataclass
class LunaConfig(WholeAttentionConfig):
    """Options of `Luna`, and those of `WholeAttentionConfig`.

    Attributes:
      latents: n, number of latents.
      carried: whether the latents are the first n tokens of a sequence, so that a model carries them from layer to layer, as
        in the paper; otherwise each layer learns its own.
    """

    latents: int = 16
    carried: bool = False


class Luna(WholeAttention):
    """Luna: linear unified nested attention (Ma et al. 2021, arXiv:2106.01540).

        p' = softmax(W_pq p (W_pk x)^T / sqrt(head_dim)) W_pv x                          n latents
        y  = W_o softmax(W_q x (W_k p')^T / sqrt(head_dim)) W_v p'

    per head. With `carried` the first n tokens are p and not part of x, and p' is the output there. Around it a model has
    norms and residual connections for latents as for tokens, and a channel mixer, which the paper has for tokens alone.
    Linear in t; packed rows cost one pass per segment; not causal.
    """

    projections = ("query", "pack_key", "pack_value")

    def __init__(self, config: LunaConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        options = {"axes": ("embed", "heads"), "bias": config.bias, "dtype": config.dtype, "rngs": rngs}
        self.pack_query = linear(config.width, config.width, **options)
        self.key = linear(config.width, config.width, **options)
        self.value = linear(config.width, config.width, **options)
        shape, axes = (config.latents, config.width), (None, "embed")
        init = nnx.initializers.normal(config.width**-0.5)
        self.latents = None if config.carried else parameter(rngs, init, shape, axes=axes)

    def features(self, x):
        return super().features(x) + ([self.pack_query(x)] if self.config.carried else [])

    def weights(self):
        latents = None if self.latents is None else self.pack_query(self.latents[...][None])
        return latents, map_of(self.key), map_of(self.value)

    def finish(self, y, positions):
        if not self.config.carried:
            return self.output(y)
        return jnp.where((positions < self.config.latents)[..., None], y, self.output(y))

    @staticmethod
    def attend(config, weights, heads, lengths):
        q, k, v, *carried = heads
        latents, *maps = weights
        count = min(config.latents, q.shape[1]) if carried else 0
        if carried:
            queries = carried[0][:, :count]
        else:
            queries = jnp.broadcast_to(latents, (q.shape[0], *latents.shape[1:])).astype(q.dtype)
            queries = split_heads(queries, config.heads)
        packed = attention(
            *(queries, k[:, count:], v[:, count:]), tokens=Tokens(kv_lengths=jnp.maximum(lengths - count, 0))
        )
        key, value = (split_heads(mapped(join_heads(packed), *one), config.heads) for one in maps)
        y = attention(q, key, value)
        return jnp.concatenate([packed[:, :count], y[:, count:]], axis=1) if carried else y
