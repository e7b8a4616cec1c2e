"""Differential attention: the difference of two softmax maps (Ye et al. 2024, arXiv:2410.05258)."""

import math

import jax.numpy as jnp
from flax import nnx

from layers.kernels.attention import Mask, Tokens, attention
from layers.mixer import Mixer, Visit
from layers.options import ActivationDtype, Count, NonNegative, checked_dataclass
from layers.parameters import NO_DECAY, Constant, linear, parameter
from layers.parts.cache import Cache, empty_cache, extend
from layers.parts.heads import HeadNorm, SharedHeads, head_size, split_heads
from layers.positions import rotary
from layers.segments import Segments
from layers.typing import Array, Float


@checked_dataclass
class DifferentialAttentionConfig(SharedHeads):
    """Options of `DifferentialAttention`.

    Attributes:
      width: d, number of input and output features.
      heads: h, number of heads, each with two query maps; half as many as softmax attention of the same size has.
      kv_heads: g, number of heads with two key maps and values; divides h. If None, equals h.
      head_dim: K, features per query and key map; even; width / (2 h) if None. Values have 2 K.
      window: number of last tokens that a query sees, its own included; None for all.
      rope_base: base of the rotations.
      epsilon: epsilon of the norm per head.
      layer, depth: index of the layer, from 0, and number of layers of the model; the index sets the initial weight of the
        second map.
      dtype: dtype of the activations and of the cache.
    """

    width: int
    heads: int = 4
    kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    rope_base: float = 10_000.0
    epsilon: NonNegative = 1e-5
    layer: Count = 0
    depth: int = 1
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        _ = self.groups
        if self.size % 2:
            raise ValueError(f"head_dim={self.size} is odd; rotations need an even one")
        if self.rope_base <= 1:
            raise ValueError(f"rope_base={self.rope_base}; expected more than 1")
        if not 0 <= self.layer < self.depth:
            raise ValueError(f"layer={self.layer}, depth={self.depth}; expected 0 <= layer < depth")

    @property
    def size(self) -> int:
        """K."""
        return head_size("head_dim", self.head_dim, self, 0.5)


class DifferentialAttention(Mixer):
    """Differential attention: two softmax maps per head, of which the second is subtracted (Ye et al. 2024, arXiv:2410.05258).

        [q1, q2], [k1, k2], v = W_q x, W_k x, W_v x;   queries and keys rotated by their positions
        o = (softmax(q1 k1^T / sqrt(K)) - lambda softmax(q2 k2^T / sqrt(K))) v                per head
        lambda = exp(l_q1 . l_k1) - exp(l_q2 . l_k2) + lambda_init,   lambda_init = 0.8 - 0.6 exp(-0.3 layer)
        y = W_o ((1 - lambda_init) RMSNorm(o))                                                norm per head

    The four vectors l (K) are shared by the heads and start normal with deviation 0.1. Both maps are one call of attention
    with twice the heads.
    """

    keeps_segments = True

    def __init__(self, config: DifferentialAttentionConfig, *, rngs: nnx.Rngs):
        self.config = config
        features, shared = 2 * config.heads * config.size, 2 * config.groups * config.size
        options = {"axes": ("embed", "heads"), "bias": False, "dtype": config.dtype, "rngs": rngs}
        self.query = linear(config.width, features, **options)
        self.key = linear(config.width, shared, **options)
        self.value = linear(config.width, shared, **options)
        self.output = linear(features, config.width, **options | {"axes": ("heads", "embed")})
        self.norm = HeadNorm(2 * config.size, epsilon=config.epsilon, dtype=config.dtype, rngs=rngs)
        # The vectors of q1, k1, q2 and k2.
        normal = nnx.initializers.normal(0.1)
        self.weights = parameter(rngs, normal, (4, config.size), axes=(None, None), **NO_DECAY)
        self.start = Constant(jnp.float32(0.8 - 0.6 * math.exp(-0.3 * config.layer)))

    def initial(self, batch_size: int, max_length: int | None) -> Cache:
        config = self.config
        return empty_cache(
            "differential_attention",
            batch_size,
            ((2 * config.groups, config.size), (config.groups, 2 * config.size)),
            config.dtype,
            max_length=max_length,
            window=config.window,
        )

    def mix(
        self,
        x: Float[Array, "b t d"],
        carried: Cache | None,
        segments: Segments | None,
        here: Visit | None,
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        config = self.config
        if here is not None:
            positions = here.positions
        else:
            positions = jnp.arange(x.shape[1])[None] if segments is None else segments.positions
        q, k = (
            rotary(split_heads(f(x), 2 * heads), positions, config.rope_base)
            for f, heads in ((self.query, config.heads), (self.key, config.groups))
        )
        v = split_heads(self.value(x), config.groups)
        options = {"causal": True, "mask": Mask(window=config.window)}
        if here is None:
            o = attention(q, k, _for_both(v), segment_ids=segments, **options)
            return self._finish(o), None
        carried, (entries, *places), beyond = extend(carried, (k, v), here, window=config.window)
        tokens = Tokens(places[0], positions, places[1])
        k, v = entries
        o = attention(q, k, _for_both(v), segment_ids=here.numbers, tokens=tokens, **options)
        return self._finish(jnp.where(beyond[..., None, None], jnp.nan, o)), carried

    def _finish(self, o: Float[Array, "b t h v"]) -> Float[Array, "b t d"]:
        """Returns the mixer's output, given what both maps of each head read."""
        q1, k1, q2, k2 = self.weights[...]
        start = self.start[...]
        weight = jnp.exp(jnp.sum(q1 * k1)) - jnp.exp(jnp.sum(q2 * k2)) + start
        pairs = o.astype(jnp.float32).reshape(*o.shape[:2], self.config.heads, 2, o.shape[3])
        y = self.norm(pairs[..., 0, :] - weight * pairs[..., 1, :])
        return self.output(y * (1 - start).astype(y.dtype))


def _for_both(v: Float[Array, "b t g v"]) -> Float[Array, "b t h v"]:
    """Returns the values once for each of the two maps."""
    return jnp.repeat(v, 2, axis=2)
