"""Normalisation over features (LayerNorm, RMSNorm) or over batch and time (BatchNorm).

A norm is called as `norm(x, mask=None, training=False)` with x (b t d) and a boolean mask (b t) of the real tokens. Whatever
stands at other tokens reaches neither the rest nor a gradient.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.options import ActivationDtype, Fraction, NonNegative, checked_dataclass
from layers.parameters import NO_DECAY, parameter
from layers.registry import build
from layers.segments import select_masked
from layers.typing import Array, Bool, Float

_zeros, _ones = nnx.initializers.zeros_init(), nnx.initializers.ones_init()


@checked_dataclass
class NormConfig:
    """Options of `RMSNorm`.

    Attributes:
      width: d, number of features.
      epsilon: added to the mean square.
      unit_offset: whether the factor is 1 + scale, so that a scale of zero changes nothing (Gemma).
      dtype: dtype of the outputs.
    """

    width: int
    epsilon: NonNegative = 1e-6
    unit_offset: bool = False
    dtype: ActivationDtype = jnp.float32


@checked_dataclass
class LayerNormConfig:
    """Options of `LayerNorm`. `bias` says whether there is one."""

    width: int
    epsilon: NonNegative = 1e-6
    bias: bool = True
    dtype: ActivationDtype = jnp.float32


@checked_dataclass
class BatchNormConfig:
    """Options of `BatchNorm`. `momentum` is the weight of the old running statistics in an update."""

    width: int
    epsilon: NonNegative = 1e-5
    momentum: Fraction = 0.9
    dtype: ActivationDtype = jnp.float32


class LayerNorm(nnx.Module):
    """y = scale (x - mean) / sqrt(variance + epsilon) + bias over features (Ba et al. 2016, arXiv:1607.06450)."""

    causal = True

    def __init__(self, config: LayerNormConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.scale = parameter(rngs, _ones, (config.width,), axes=("embed",), **NO_DECAY)
        own = {"axes": ("embed",), **NO_DECAY}
        self.bias = parameter(rngs, _zeros, (config.width,), **own) if config.bias else None

    def __call__(
        self, x: Float[Array, "*b d"], *, mask: Bool[Array, "*b"] | None = None, training: bool = False
    ) -> Float[Array, "*b d"]:
        """Returns x, normalised per token; training changes nothing here."""
        wide = select_masked(x, mask).astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.config.epsilon)
        y = y * _as_rows(self.scale[...], x.ndim)
        if self.bias is not None:
            y = y + _as_rows(self.bias[...], x.ndim)
        return y.astype(self.config.dtype)


class RMSNorm(nnx.Module):
    """y = scale x / sqrt(mean(x^2) + epsilon) over features (Zhang and Sennrich 2019, arXiv:1910.07467).

    With `unit_offset`, the factor is 1 + scale, and the scale starts at zero.
    """

    causal = True

    def __init__(self, config: NormConfig, *, rngs: nnx.Rngs):
        self.config = config
        init = _zeros if config.unit_offset else _ones
        self.scale = parameter(rngs, init, (config.width,), axes=("embed",), **NO_DECAY)

    def __call__(
        self, x: Float[Array, "*b d"], *, mask: Bool[Array, "*b"] | None = None, training: bool = False
    ) -> Float[Array, "*b d"]:
        """Returns x, normalised per token; training changes nothing here."""
        wide = select_masked(x, mask).astype(jnp.float32)
        y = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.config.epsilon)
        factor = 1 + self.scale[...] if self.config.unit_offset else self.scale[...]
        return (y * _as_rows(factor, x.ndim)).astype(self.config.dtype)


def _as_rows(v: jax.Array, ndim: int) -> jax.Array:
    """Returns a vector of features with leading axes of size 1."""
    return v.reshape((1,) * (ndim - 1) + (-1,))


class BatchNorm(nnx.Module):
    """y = scale (x - mean) / sqrt(variance + epsilon) + bias over batch and time (Ioffe and Szegedy 2015, 1502.03167).

    Not causal: in training, every output depends on all tokens of the batch, later ones included.

    In training, mean and variance are those of the real tokens of the batch, and the running statistics move towards
    them. Otherwise the running statistics are used.
    """

    causal = False

    def __init__(self, config: BatchNormConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.scale = parameter(rngs, _ones, (config.width,), axes=("embed",), **NO_DECAY)
        self.bias = parameter(rngs, _zeros, (config.width,), axes=("embed",), **NO_DECAY)
        self.mean = nnx.BatchStat(jnp.zeros(config.width, jnp.float32))
        self.variance = nnx.BatchStat(jnp.ones(config.width, jnp.float32))

    def __call__(
        self, x: Float[Array, "b t d"], *, mask: Bool[Array, "b t"] | None = None, training: bool = False
    ) -> Float[Array, "b t d"]:
        """Returns x, normalised over the real tokens; in training, updates the running statistics in place."""
        wide = select_masked(x, mask).astype(jnp.float32)
        if training:
            mean, variance = _moments(wide, mask)
            keep = self.config.momentum
            self.mean[...] = keep * self.mean[...] + (1 - keep) * jax.lax.stop_gradient(mean)
            self.variance[...] = keep * self.variance[...] + (1 - keep) * jax.lax.stop_gradient(variance)
        else:
            mean, variance = self.mean[...], self.variance[...]
        scale = self.scale[...] * jax.lax.rsqrt(variance + self.config.epsilon)
        shift = self.bias[...] - mean * scale
        return (wide * scale[None, None] + shift[None, None]).astype(self.config.dtype)


def _moments(x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Mean and (biased) variance, over batch and time, of the tokens that the mask keeps."""
    count = x.shape[0] * x.shape[1] if mask is None else jnp.maximum(mask.sum(), 1).astype(x.dtype)
    kept = (lambda v: v) if mask is None else (lambda v: jnp.where(mask[..., None], v, 0))
    mean = kept(x).sum((0, 1)) / count
    # The variance is smallest about the mean, so its derivative by the mean is zero; this saves a pass over memory.
    centre = jax.lax.stop_gradient(mean)[None, None]
    return mean, kept(jnp.square(x - centre)).sum((0, 1)) / count


NORMS = {
    "layer_norm": (LayerNormConfig, LayerNorm),
    "rms_norm": (NormConfig, RMSNorm),
    "batch_norm": (BatchNormConfig, BatchNorm),
}


def causal_norms() -> list[str]:
    """Returns the names of norms whose output at a token depends on no later token, in training either."""
    return [name for name, (_, norm) in NORMS.items() if norm.causal]


def make_norm(name: str, options: dict[str, Any], *, width: int, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
    """Returns the norm called `name`; see `NORMS`."""
    return build("norm", NORMS, name, options, given={"width": width, "dtype": dtype}, rngs=rngs)
