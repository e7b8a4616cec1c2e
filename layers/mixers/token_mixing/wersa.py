"""WERSA: linear attention between queries and keys whose wavelet scales are weighted (Dentamaro 2025, arXiv:2507.08637)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layers.kernels.linear_recurrence import linear_recurrence
from layers.mixer import SELF, Mixer
from layers.mixers.linear_attention.performer import LARGEST_EXPONENT, orthogonal_directions
from layers.options import ActivationDtype, NonNegative, checked_dataclass
from layers.parameters import NO_DECAY, Constant, linear, parameter
from layers.parts.each_segment import mix_each_segment
from layers.parts.feature_attention import feature_attention
from layers.parts.heads import head_size, join_heads, split_heads
from layers.parts.segmented_convolution import last_inputs, pack_rows
from layers.segments import Segments
from layers.typing import Array, Float

_ones, _zeros = nnx.initializers.ones_init(), nnx.initializers.zeros_init()


@checked_dataclass
class WERSAConfig:
    """Options of `WERSA`.

    Attributes:
      width: d, number of input and output features.
      heads: h, number of heads.
      head_dim: K, features per head; width / heads if None.
      levels: L, number of scales of the wavelet transform; the coarsest averages 2^L tokens.
      features: m, number of random features per head.
      epsilon: number added to every feature, so that no weight vanishes.
      causal: whether a token sees only itself and earlier tokens; if so, averages trail the token instead of lying on a
        grid.
      bias: whether the projections have biases.
      dtype: dtype of the activations; filters, sums and state are float32.
    """

    width: int
    heads: int = 8
    head_dim: int | None = None
    levels: int = 4
    features: int = 128
    epsilon: NonNegative = 1e-6
    causal: bool = False
    bias: bool = False
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        _ = self.size

    @property
    def size(self) -> int:
        """Features per head."""
        return head_size("head_dim", self.head_dim, self)


class WERSACarry(NamedTuple):
    """What a causal `WERSA` carries.

    Attributes:
      past: queries and keys of the last 2^L - 1 tokens of the segment, latest last.
      total: sum of the queries of the segment; the last entry is their number.
      memory: matrix memory of the attention; the last column is the sum of keys.
    """

    past: Float[Array, "b s f"]
    total: Float[Array, "b f"]
    memory: Float[Array, "b h m v"]


class WERSA(Mixer):
    """WERSA: wavelet-enhanced random spectral attention (Dentamaro 2025, arXiv:2507.08637).

        g = s * sigmoid(MLP(mean of q))                      per head, one weight per scale and one for the rest
        filter(u) = g_0 A_L u + sum_{l<=L} g_l (A_{l-1} - A_l) u,    A_0 u = u
        phi(u)_i = exp(w_i . beta u - |beta u|^2 / 2) + epsilon
        y = W_o sum_s (phi(q'_t) . phi(k'_s)) v_s / sum_s (phi(q'_t) . phi(k'_s)),    q', k' = filter(q), filter(k)

    A_l averages over blocks of 2^l tokens, and (A_{l-1} - A_l) u is the Haar wavelet component of u at level l: the
    filter is the transform, the weights and the inverse transform. With all weights 1 it is the identity. s (h, L + 1)
    and the bandwidths beta (h) are learned; beta starts at K^(-1/4), so that the mean over w ~ N(0, 1)^K is proportional
    to exp(q' . k' / sqrt(K)).

    Causal: A_l u_t is the mean of the last 2^l inputs (zero before the first), and the mean of q is over the tokens so
      far. On a grid of blocks, averages would see later tokens.

    The paper specifies the parts: Haar wavelets of queries and keys, weights from an MLP times learned weights of the
    scales, random features for the softmax kernel, and linear attention. The input of the MLP, weights and bandwidths per
    head, the exponential features and the causal form are our reading.
    """

    patterns = SELF
    isolates_tokens = True

    def __init__(self, config: WERSAConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.causal = config.causal
        width = config.heads * config.size
        options = {"axes": ("embed", "heads"), "bias": config.bias, "dtype": config.dtype, "rngs": rngs}
        self.query = linear(config.width, width, **options)
        self.key = linear(config.width, width, **options)
        self.value = linear(config.width, width, **options)
        self.output = linear(width, config.width, **options | {"axes": ("heads", "embed")})
        self.inner = linear(config.size, config.size, rngs=rngs)
        self.outer = linear(config.size, config.levels + 1, rngs=rngs)
        scales = (config.heads, config.levels + 1)
        self.scales = parameter(rngs, _ones, scales, axes=("heads", None), **NO_DECAY)
        self.log_bandwidth = parameter(rngs, _zeros, (config.heads,), axes=("heads",), **NO_DECAY)
        self.directions = Constant(orthogonal_directions(rngs.params(), config.features, config.size))

    def initial(self, batch_size: int, max_length: int | None) -> WERSACarry:
        config = self.config
        width = config.heads * config.size
        return WERSACarry(
            past=jnp.zeros((batch_size, 2**config.levels - 1, 2 * width), jnp.float32),
            total=jnp.zeros((batch_size, width + 1), jnp.float32),
            memory=jnp.zeros((batch_size, config.heads, config.features, config.size + 1), jnp.float32),
        )

    def mix(
        self, x: Float[Array, "b t d"], carried: WERSACarry | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], WERSACarry]:
        config = self.config
        qk = jnp.concatenate([self.query(x), self.key(x)], axis=-1).astype(jnp.float32)
        past, total, memory = (None, None, None) if carried is None else carried
        if config.causal:
            qk, past, total = self._filter_causally(qk, past, total, segments)
        else:
            qk = mix_each_segment(partial(_filter, config), self._gates(), qk, segment_ids=segments)
        q, k = (self._features(part, i) for i, part in enumerate(jnp.split(qk, 2, axis=-1)))
        v = split_heads(self.value(x), config.heads)
        o, memory = feature_attention(q, k, v, memory, causal=config.causal, segment_ids=segments)
        y = self.output(join_heads(o))
        return y, WERSACarry(past, total, memory)

    def _gates(self) -> tuple[Array, ...]:
        layers = (self.inner, self.outer)
        return *(v for layer in layers for v in (layer.matrix, layer.bias[...])), self.scales[...]

    def _filter_causally(self, qk, past, total, segments):
        """Returns filtered queries and keys, and what the next call needs: past inputs and the sum of queries."""
        config = self.config
        b, t, f = qk.shape
        if past is None:
            past = jnp.zeros((b, 2**config.levels - 1, f), qk.dtype)
        counted = jnp.concatenate([qk[..., : f // 2], jnp.ones((b, t, 1), qk.dtype)], axis=-1)
        sums, total = linear_recurrence(
            jnp.ones((1, 1, f // 2 + 1), qk.dtype), counted, initial_state=total, segment_ids=segments
        )
        mean = sums[..., :-1] / jnp.maximum(sums[..., -1:], 1)
        averages = _trailing_averages(qk, past, config.levels, segments)
        gates = _gates(config, self._gates(), mean)
        return _weighted(averages, gates), last_inputs(past, qk, segments), total

    def _features(self, x: Float[Array, "b t f"], is_key: int) -> Float[Array, "b t h m"]:
        """Returns phi of queries or keys; a factor common to all features of a query cancels."""
        config = self.config
        bandwidth = jnp.exp(self.log_bandwidth[...]) * config.size**-0.25
        x = split_heads(x, config.heads) * bandwidth[None, None, :, None]
        exponent = jnp.einsum("bthk,mk->bthm", x, self.directions[...])
        if is_key:
            exponent = jnp.minimum(exponent - jnp.square(x).sum(-1, keepdims=True) / 2, LARGEST_EXPONENT)
        else:
            exponent = exponent - jax.lax.stop_gradient(exponent.max(-1, keepdims=True))
        return (jnp.exp(exponent) + config.epsilon).astype(config.dtype)


def _gates(config, weights, mean):
    """Returns g (b, t, 1, h, 1, L + 1) of mean queries (b, t, h K); the unit axes are query/key and features."""
    inner, inner_bias, outer, outer_bias, scales = weights
    hidden = jax.nn.gelu(
        jnp.einsum("bthk,kf->bthf", split_heads(mean, config.heads), inner) + inner_bias[None, None, None]
    )
    logits = jnp.einsum("bthf,fl->bthl", hidden, outer) + outer_bias[None, None, None]
    return (scales[None, None] * jax.nn.sigmoid(logits))[:, :, None, :, None]


def _weighted(averages, gates):
    """Returns g_0 A_L + sum_l g_l (A_{l-1} - A_l) of queries and keys (b, t, 2 h K)."""
    b, t, f = averages[0].shape
    heads = gates.shape[3]
    averages = [a.reshape(b, t, 2, heads, f // (2 * heads)) for a in averages]
    y = gates[..., 0] * averages[-1]
    for level in range(1, len(averages)):
        y = y + gates[..., level] * (averages[level - 1] - averages[level])
    return y.reshape(b, t, f)


def _filter(config, weights, qk, lengths):
    """Filters sequences that are zero from their lengths on, by averages over a grid of blocks."""
    b, t, f = qk.shape
    mean = qk[..., : f // 2].sum(1, keepdims=True) / lengths.astype(qk.dtype)[:, None, None]
    whole = jnp.pad(qk, ((0, 0), (0, -t % 2**config.levels), (0, 0)))
    averages = [qk]
    for level in range(1, config.levels + 1):
        blocks = whole.reshape(b, whole.shape[1] // 2**level, 2**level, f).mean(2)
        averages.append(jnp.repeat(blocks, 2**level, axis=1)[:, :t])
    return _weighted(averages, _gates(config, weights, mean))


def _trailing_averages(x, past, levels, segments):
    """Returns x and the means of the last 2, 4, ... 2^levels inputs, zero before the start of the segment."""
    size, t = past.shape[1], x.shape[1]
    packing = None if segments is None else pack_rows(segments)
    ordered = x if packing is None else packing.pack(x)
    numbers = jnp.ones(x.shape[:2], jnp.int32) if packing is None else packing.numbers
    numbers = jnp.pad(numbers, ((0, 0), (size, 0)), constant_values=1)
    average, averages = jnp.concatenate([past, ordered], axis=1), [x]
    for level in range(levels):
        back = ((0, 0), (2**level, 0))
        same = jnp.pad(numbers, back)[:, : size + t] == numbers
        earlier = jnp.pad(average, (*back, (0, 0)))[:, : size + t]
        average = (average + jnp.where(same[..., None], earlier, 0)) / 2
        new = average[:, size:]
        averages.append(new if packing is None else packing.unpack(new))
    return averages
