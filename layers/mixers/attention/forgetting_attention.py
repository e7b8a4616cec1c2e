"""Forgetting attention (FoX): softmax attention whose logits decay by learned forget gates (Lin et al. 2025, arXiv:2503.02130)."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layers.kernels.attention import Logits, Tokens, attention
from layers.kernels.linear_recurrence import linear_recurrence
from layers.mixer import Mixer, Visit
from layers.norms import NormConfig, RMSNorm
from layers.options import ActivationDtype, NonNegative, checked_dataclass
from layers.parameters import linear
from layers.parts.cache import Cache, empty_cache, extend
from layers.parts.heads import HeadRMSNorm, SharedHeads, head_size, join_heads, split_heads
from layers.segments import Segments, keep_where
from layers.typing import Array, Float


@checked_dataclass
class ForgettingAttentionConfig(SharedHeads):
    """Options of `ForgettingAttention`.

    Attributes:
      width: d, number of input and output features.
      heads: h, number of query heads, each with a forget gate.
      kv_heads: g, number of key/value heads; divides h. If None, equals h.
      head_dim: features per head; width / h if None.
      qk_norm: whether RMSNorm normalizes the features of each query and key head.
      norm_scales: whether the heads share the scale of these norms, or each has its "own".
      gate: whether sigmoid(W_g x) gates the output, as in the authors' "Pro" block.
      epsilon: epsilon of these norms.
      dtype: dtype of the activations and of cached keys and values; sums of gates are float32.
    """

    width: int
    heads: int = 8
    kv_heads: int | None = None
    head_dim: int | None = None
    qk_norm: bool = False
    norm_scales: Literal["shared", "own"] = "shared"
    gate: bool = False
    epsilon: NonNegative = 1e-6
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        _ = self.size, self.groups
        if self.norm_scales == "own" and not self.qk_norm:
            raise ValueError("norm_scales='own' without norms; set qk_norm=True, or leave it at 'shared'")

    @property
    def size(self) -> int:
        """Features per head."""
        return head_size("head_dim", self.head_dim, self)


class ForgettingCarry(NamedTuple):
    """What `ForgettingAttention` carries: keys, values and sums of log-gates, and the sum at the last token, float32."""

    cache: Cache
    total: Float[Array, "b h"]


class ForgettingAttention(Mixer):
    """Forgetting attention: logits that decay between key and query (Lin et al. 2025, arXiv:2503.02130).

        q, k, v = W_q x, W_k x, W_v x,   log f = log_sigmoid(W_f x + b)               (h) gates
        a_ij = q_i . k_j / sqrt(head_dim) + sum_{j < l <= i} log f_l,   y_i = W_o sum_j softmax_j(a_ij) v_j

    There are no positions; the gates take their place. With c_i the sum of log f up to token i of the segment, the logits
    are q_i . k_j / sqrt(head_dim) - c_j up to a number per query, on which softmax does not depend: a bias per key. Sums are
    exact to 6e-8 of their size, which is 1e-3 where c has reached -10,000.
    """

    keeps_segments = True

    def __init__(self, config: ForgettingAttentionConfig, *, rngs: nnx.Rngs):
        self.config = config
        features, shared = config.heads * config.size, config.groups * config.size
        options = {"axes": ("embed", "heads"), "bias": False, "dtype": config.dtype, "rngs": rngs}
        self.query = linear(config.width, features, **options)
        self.key = linear(config.width, shared, **options)
        self.value = linear(config.width, shared, **options)
        self.forget = linear(config.width, config.heads, **options | {"bias": True})
        self.gate = linear(config.width, features, **options) if config.gate else None
        self.output = linear(features, config.width, **options | {"axes": ("heads", "embed")})
        self.query_norm = self._norm(config.heads, rngs) if config.qk_norm else None
        self.key_norm = self._norm(config.groups, rngs) if config.qk_norm else None

    def _norm(self, heads: int, rngs: nnx.Rngs) -> RMSNorm | HeadRMSNorm:
        """Returns the norm of queries or keys."""
        config = self.config
        if config.norm_scales == "own":
            own = {"epsilon": config.epsilon, "dtype": config.dtype}
            return HeadRMSNorm(heads, config.size, **own, rngs=rngs)
        return RMSNorm(NormConfig(config.size, config.epsilon, dtype=config.dtype), rngs=rngs)

    def initial(self, batch_size: int, max_length: int | None) -> ForgettingCarry:
        config = self.config
        shapes = ((config.groups, config.size),) * 2
        cache = empty_cache("forgetting_attention", batch_size, shapes, config.dtype, max_length=max_length)
        sums = jnp.zeros((*cache.numbers.shape, config.heads), jnp.float32)
        total = jnp.zeros((batch_size, config.heads), jnp.float32)
        return ForgettingCarry(cache._replace(entries=(*cache.entries, sums)), total)

    def mix(
        self,
        x: Float[Array, "b t d"],
        carried: ForgettingCarry | None,
        segments: Segments | None,
        here: Visit | None,
    ) -> tuple[Float[Array, "b t d"], ForgettingCarry | None]:
        config = self.config
        q = split_heads(self.query(x), config.heads)
        k, v = (split_heads(f(x), config.groups) for f in (self.key, self.value))
        if config.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        log_forget = jax.nn.log_sigmoid(self.forget(x).astype(jnp.float32))
        total = jnp.zeros((x.shape[0], config.heads), jnp.float32)
        if here is not None:
            total = keep_where(here.continues, carried.total, total)
        ones = jnp.ones((1, 1, config.heads), jnp.float32)
        sums, total = linear_recurrence(ones, log_forget, initial_state=total, segment_ids=segments)
        if here is None:
            o = attention(q, k, v, causal=True, logits=_forgetting(sums), segment_ids=segments)
            return self._finish(o, x), None
        cache, (entries, numbers, positions), beyond = extend(carried.cache, (k, v, sums), here)
        k, v, sums = entries
        o = attention(
            *(q, k, v),
            causal=True,
            logits=_forgetting(sums),
            segment_ids=here.numbers,
            tokens=Tokens(numbers, here.positions, positions),
        )
        return self._finish(jnp.where(beyond[..., None, None], jnp.nan, o), x), ForgettingCarry(cache, total)

    def _finish(self, o: Float[Array, "b t h k"], x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        y = join_heads(o)
        return self.output(y if self.gate is None else y * jax.nn.sigmoid(self.gate(x)))


def _forgetting(sums: Float[Array, "b s h"]) -> Logits:
    """Returns logits with the bias per key."""
    return Logits(bias=-jnp.swapaxes(sums, 1, 2)[:, :, None])
