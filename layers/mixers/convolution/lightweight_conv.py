"""Lightweight and dynamic convolution: a normalized window per head (Wu et al. 2019, arXiv:1901.10430)."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from layers.mixer import Mixer
from layers.options import ActivationDtype, checked_dataclass
from layers.parameters import linear, parameter
from layers.parts.segmented_convolution import last_inputs, pack_rows
from layers.segments import SegmentIds, Segments, select_real
from layers.typing import Array, Float

_xavier = nnx.initializers.xavier_uniform()


@checked_dataclass
class LightweightConvConfig:
    """Options of `LightweightConv` and `DynamicConv`.

    Attributes:
      width: d, number of input and output features.
      heads: h, number of windows; divides the width.
      taps: w, number of tokens that a window covers, the current one included.
      dtype: dtype of the activations; weights of windows and the state are float32.
    """

    width: int
    heads: int = 8
    taps: int = 31
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width={self.width}")


class _Windows(Mixer):
    """The base class of `LightweightConv` and `DynamicConv`, without the weights. Carries the last w - 1 gated inputs."""

    def __init__(self, config: LightweightConvConfig, *, rngs: nnx.Rngs):
        self.config = config
        options = {"dtype": config.dtype, "init": _xavier, "rngs": rngs}
        self.input = linear(config.width, 2 * config.width, axes=("embed", "inner"), **options)
        self.output = linear(config.width, config.width, axes=("inner", "embed"), **options)

    def logits(self, gated: Float[Array, "b t d"]) -> Float[Array, "#b #t h w"]:
        """Returns the logits of each window, oldest tap first."""
        raise NotImplementedError

    def initial(self, batch_size: int, max_length: int | None) -> Float[Array, "b s d"]:
        return jnp.zeros((batch_size, self.config.taps - 1, self.config.width), jnp.float32)

    def mix(
        self, x: Float[Array, "b t d"], carried: Float[Array, "b s d"] | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b s d"]]:
        value, gate = jnp.split(self.input(x), 2, axis=-1)
        gated = value * jax.nn.sigmoid(gate)
        past = self.initial(x.shape[0], None) if carried is None else carried
        weights = jax.nn.softmax(self.logits(gated).astype(jnp.float32))
        y = window_sum(gated, weights, past, segment_ids=segments).astype(self.config.dtype)
        return self.output(y), last_inputs(past, gated, segments)


class LightweightConv(_Windows):
    """LightweightConv: a softmax-normalized depthwise convolution (Wu et al. 2019, arXiv:1901.10430).

        g = (W_1 x + b_1) * sigmoid(W_2 x + b_2)
        y_t = W_o sum_{j<w} softmax(W_h)_j g_{t-(w-1)+j} + b_o

    with one vector W_h (w) for the d / h neighboring channels of each head. The softmax is over all taps, those before
    the start of the segment included, where g counts as zero. The paper drops normalized weights at random in training;
    this class does not.
    """

    def __init__(self, config: LightweightConvConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.weight = parameter(rngs, _window_init, (config.heads, config.taps), axes=("heads", None))

    def logits(self, gated: Float[Array, "b t d"]) -> Float[Array, "1 1 h w"]:
        return self.weight[...][None, None]


class DynamicConv(_Windows):
    """DynamicConv: a lightweight convolution whose weights every token predicts (Wu et al. 2019, arXiv:1901.10430).

        g = (W_1 x + b_1) * sigmoid(W_2 x + b_2)
        y_t = W_o sum_{j<w} softmax(W_h g_t)_j g_{t-(w-1)+j} + b_o

    with W_h (w x d) for the d / h neighboring channels of each head; otherwise as `LightweightConv`.
    """

    def __init__(self, config: LightweightConvConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        taps, options = config.heads * config.taps, {"dtype": config.dtype, "rngs": rngs}
        self.weight = linear(config.width, taps, axes=("inner", None), bias=False, init=_xavier, **options)

    def logits(self, gated: Float[Array, "b t d"]) -> Float[Array, "b t h w"]:
        return self.weight(gated).reshape(*gated.shape[:2], self.config.heads, self.config.taps)


def _window_init(key, shape, dtype):
    # Xavier's bound for torch's shape (heads, 1, taps), whose fans are taps and heads taps.
    bound = math.sqrt(6 / (shape[1] + math.prod(shape)))
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def window_sum(
    x: Float[Array, "b t d"],
    weights: Float[Array, "#b #t h w"],
    past: Float[Array, "b s d"],
    *,
    segment_ids: SegmentIds = None,
) -> Float[Array, "b t d"]:
    """y_t = sum_{j<w} weights_{t,h,j} x_{t-(w-1)+j} for the d / h neighboring channels of each head, in float32.

    Args:
      x: input.
      weights: weights per tap, oldest first; the last tap is the token itself. If t is 1, all tokens share them.
      past: the w - 1 inputs before the first real token, zeros before its segment begins.
      segment_ids: inputs of other segments count as zeros; the output at padding is zero.
    """
    taps, channels = weights.shape[-1], x.shape[2] // weights.shape[2]
    segments, owners = Segments.of(segment_ids), None
    if segments is not None:
        packing = pack_rows(segments)
        x = packing.pack(select_real(x, segments))
        weights = weights if weights.shape[1] == 1 else packing.pack(weights)
        if segments.packed:
            owners = jnp.pad(packing.numbers, ((0, 0), (taps - 1, 0)), constant_values=1)
    inputs = jnp.concatenate([past, x.astype(past.dtype)], axis=1)
    # Weights that are not finite multiply earlier inputs, and their gradients.
    fit = jnp.isfinite(weights).all(3)
    weights = jnp.where(fit[..., None], weights, 0)

    def at(values, tap):
        return jax.lax.dynamic_slice_in_dim(values, tap, x.shape[1], axis=1)

    def add(y, tap):
        weight = jax.lax.dynamic_index_in_dim(weights, tap, axis=3, keepdims=False)
        value = at(inputs, tap)
        if owners is not None:
            value = jnp.where((at(owners, tap) == packing.numbers)[..., None], value, 0)
        return y + jnp.repeat(weight, channels, axis=2) * value, None

    y, _ = jax.lax.scan(add, jnp.zeros(x.shape, past.dtype), jnp.arange(taps))
    y = jnp.where(jnp.repeat(fit, channels, axis=2), y, jnp.nan)
    return y if segments is None else select_real(packing.unpack(y), segments)
