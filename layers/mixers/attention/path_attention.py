"""PaTH attention: positions by accumulated Householder transforms of the tokens in between (Yang et al. 2025, arXiv:2505.16381)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layers.kernels.attention import Piece, Tokens, attention_with_lse, compose
from layers.kernels.isolation import isolated_tokens
from layers.mixer import Mixer, Visit
from layers.norms import NormConfig, RMSNorm
from layers.options import ActivationDtype, NonNegative, checked_dataclass
from layers.parameters import linear
from layers.parts.cache import Cache, empty_cache, extend
from layers.parts.heads import SharedHeads, head_size, join_heads, split_heads, unit
from layers.parts.householder_path import path_attention
from layers.parts.low_rank import LowRank
from layers.parts.short_convolution import ShortConvolution
from layers.segments import Segments, keep_where
from layers.typing import Array, Float


@checked_dataclass
class PaTHAttentionConfig(SharedHeads):
    """Options of `PaTHAttention`.

    Attributes:
      width: d, number of input and output features.
      heads: h, number of query heads.
      kv_heads: g, number of heads of keys, values and transforms; divides h. If None, equals h.
      head_dim: features per head; width / h if None.
      rank: rank of the map to the directions of the transforms; None for a full one.
      taps: number of inputs that the short convolution of these directions sees; None for no convolution.
      qk_norm: whether RMSNorm normalizes the features of each query and key head.
      chunk: tokens whose transforms are multiplied at once.
      epsilon: epsilon of these norms.
      dtype: dtype of the activations; transforms, logits and cached keys are float32.
    """

    width: int
    heads: int = 8
    kv_heads: int | None = None
    head_dim: int | None = None
    rank: int | None = 32
    taps: int | None = 3
    qk_norm: bool = False
    chunk: int = 64
    epsilon: NonNegative = 1e-6
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        _ = self.size, self.groups

    @property
    def size(self) -> int:
        """Features per head."""
        return head_size("head_dim", self.head_dim, self)


class PaTHCarry(NamedTuple):
    """What `PaTHAttention` carries: keys, transformed up to the last token, and values; and inputs of the convolution."""

    cache: Cache
    inputs: Float[Array, "b taps d"] | None


class PaTHAttention(Mixer):
    """PaTH: softmax attention whose positions are accumulated Householder transforms (Yang et al. 2025, arXiv:2505.16381).

        q, k, v = W_q x, W_k x, W_v x
        w = unit(silu(short_conv(W_w x))),   beta = 2 sigmoid(W_b x + b),   H_t = I - beta_t w_t w_t^T        per key head
        a_ij = q_i^T H_i H_{i-1} ... H_{j+1} k_j / sqrt(head_dim),   y_i = W_o sum_{j <= i} softmax_j(a_ij) v_j

    The transforms between a query and a key stand in place of a rotation by their distance; with beta up to 2 they may
    reflect, so that a layer can track states. Every new token transforms all cached keys by its H_t, after which a key needs
    nothing but its product with a query. Products of transforms are formed in chunks; work grows with t^2, memory with t.
    """

    keeps_segments = True

    def __init__(self, config: PaTHAttentionConfig, *, rngs: nnx.Rngs):
        self.config = config
        features, shared = config.heads * config.size, config.groups * config.size
        options = {"axes": ("embed", "heads"), "bias": False, "dtype": config.dtype, "rngs": rngs}
        self.query = linear(config.width, features, **options)
        self.key = linear(config.width, shared, **options)
        self.value = linear(config.width, shared, **options)
        if config.rank is None:
            self.direction = linear(config.width, shared, **options)
        else:
            own = {"bias": False, "dtype": config.dtype, "rngs": rngs}
            self.direction = LowRank(config.width, config.rank, shared, **own)
        own = {"axis": "heads", "dtype": config.dtype, "rngs": rngs}
        self.convolution = None if config.taps is None else ShortConvolution(shared, config.taps, **own)
        self.strength = linear(config.width, config.groups, **options | {"bias": True})
        norm = NormConfig(config.size, config.epsilon, dtype=config.dtype)
        self.query_norm = RMSNorm(norm, rngs=rngs) if config.qk_norm else None
        self.key_norm = RMSNorm(norm, rngs=rngs) if config.qk_norm else None
        self.output = linear(features, config.width, **options | {"axes": ("heads", "embed")})

    def initial(self, batch_size: int, max_length: int | None) -> PaTHCarry:
        config = self.config
        shapes = ((config.groups, config.size),) * 2
        cache = empty_cache("path_attention", batch_size, shapes, config.dtype, max_length=max_length)
        keys, values = cache.entries
        inputs = None if self.convolution is None else self.convolution.init_state(batch_size)
        return PaTHCarry(cache._replace(entries=(keys.astype(jnp.float32), values)), inputs)

    def mix(
        self,
        x: Float[Array, "b t d"],
        carried: PaTHCarry | None,
        segments: Segments | None,
        here: Visit | None,
    ) -> tuple[Float[Array, "b t d"], PaTHCarry | None]:
        if x.shape[1] == 0:
            return x, carried
        if here is not None:
            # What a new segment cannot see is forgotten, whatever stands in it.
            empty = jax.tree.map(jnp.zeros_like, carried)
            carried = keep_where(here.continues, carried, empty)
        return isolated_tokens(partial(self._attend, here=here))(x, carried, segments)

    def _attend(self, x, carried, segments, here):
        config = self.config
        q = split_heads(self.query(x), config.heads)
        k, v, w, beta, inputs = self._projected(x, carried, segments)
        if config.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        if here is not None:
            numbers = here.numbers
        else:
            numbers = jnp.ones(x.shape[:2], jnp.int32) if segments is None else segments.numbers
        beta = jnp.where((numbers != 0)[..., None], beta, 0)
        scale = config.size**-0.5
        path = path_attention(q, k, v, w, beta, numbers, scale=scale, chunk=config.chunk)
        if here is None:
            return self._finish(path.piece), None
        cache = carried.cache
        keys, values = cache.entries
        older = attention_with_lse(
            *(path.queries, keys, values),
            causal=True,
            scale=scale,
            segment_ids=here.numbers,
            tokens=Tokens(cache.numbers, here.positions, cache.positions),
        )
        keys = jnp.einsum("bgij,bsgj->bsgi", path.transform, keys, precision=jax.lax.Precision.HIGHEST)
        cache, _, beyond = extend(cache._replace(entries=(keys, values)), (path.keys, v), here)
        y = self._finish(compose(path.piece, older))
        return jnp.where(beyond[..., None], jnp.nan, y), PaTHCarry(cache, inputs)

    def _projected(self, x, carried, segments):
        """Keys, values, directions and strengths by heads, and the inputs that the convolution carries."""
        groups, inputs = self.config.groups, None
        w = self.direction(x)
        if self.convolution is not None:
            inputs = None if carried is None else carried.inputs
            w, inputs = self.convolution(w, inputs, segment_ids=segments)
        beta = 2 * jax.nn.sigmoid(self.strength(x).astype(jnp.float32))
        k, v = (split_heads(f(x), groups) for f in (self.key, self.value))
        return k, v, unit(split_heads(w, groups)), beta, inputs

    def _finish(self, piece: Piece) -> Float[Array, "b t d"]:
        return self.output(join_heads(piece.output.astype(self.config.dtype)))
