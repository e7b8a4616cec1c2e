"""Heads of mixers: their sizes, splitting and joining, and the norm and gate after them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.parameters import NO_DECAY, parameter
from layers.typing import Array, Float

GATES = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}


def head_size(field: str, given: int | None, config: Any, part: float = 1.0) -> int:
    """Returns the features per head: `given`, or `part * config.width` divided by `config.heads`.

    Raises:
      ValueError: the quotient is not an integer; names the config's field.
    """
    if given is not None:
        return given
    size = part * config.width / config.heads
    if size < 1 or not size.is_integer():
        raise ValueError(
            f"heads={config.heads} cannot share {part:g} x width={config.width} equally; "
            f"choose heads that do, or set {field}"
        )
    return int(size)


class SharedHeads:
    """Base class of configs with `heads` and `kv_heads`, whose query heads share heads of keys and values."""

    @property
    def groups(self) -> int:
        """Number of heads of keys and values: `kv_heads`, or `heads` if None.

        Raises:
          ValueError: they do not divide the heads.
        """
        if self.kv_heads is None:
            return self.heads
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        return self.kv_heads


def split_heads(x: Float[Array, "b t d"], heads: int) -> Float[Array, "b t h k"]:
    """Returns the features split into contiguous heads."""
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads)


def join_heads(x: Float[Array, "b t h k"]) -> Float[Array, "b t d"]:
    """Returns the heads joined; the inverse of `split_heads`."""
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3])


def unit(x: Float[Array, "b t h k"]) -> Float[Array, "b t h k"]:
    """Returns x / sqrt(sum x^2 + 1e-6) per head, float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-6)


class HeadNorm(nnx.Module):
    """Norm and gate after the heads: y = scale o / sqrt(mean(o^2) + epsilon) * activation(gate), float32 inside.

    The mean is over the features of each head, and all heads share one scale.

    Args:
      size: features per head.
      gate: activation of the gate, "silu" or "sigmoid"; None for no gate.
      affine: whether the norm has a scale.
    """

    def __init__(
        self,
        size: int,
        *,
        gate: str | None = None,
        affine: bool = True,
        epsilon: float = 1e-5,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.gate, self.epsilon, self.dtype = gate, epsilon, dtype
        ones = nnx.initializers.ones_init()
        self.scale = parameter(rngs, ones, (size,), **NO_DECAY) if affine else None

    def __call__(
        self, o: Float[Array, "b t h v"], gate: Float[Array, "b t d"] | None = None
    ) -> Float[Array, "b t d"]:
        """Returns the heads, normalized, gated and joined."""
        y = o.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        if self.scale is not None:
            y = y * self.scale[...][None, None, None]
        y = join_heads(y)
        if self.gate is not None:
            y = y * GATES[self.gate](gate.astype(jnp.float32))
        return y.astype(self.dtype)


class HeadRMSNorm(nnx.Module):
    """RMSNorm of every head, y = scale x / sqrt(mean(x^2) + epsilon), in which each head has a scale of its own."""

    def __init__(self, heads: int, size: int, *, epsilon: float, dtype: Any, rngs: nnx.Rngs):
        self.epsilon, self.dtype = epsilon, dtype
        ones = nnx.initializers.ones_init()
        self.scale = parameter(rngs, ones, (heads * size,), axes=("heads",), **NO_DECAY)

    def __call__(self, x: Float[Array, "b t h k"]) -> Float[Array, "b t h k"]:
        """Returns the heads, normalized."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        return (y * self.scale[...].reshape(x.shape[2:])[None, None]).astype(self.dtype)


class HeadLayerNorm(nnx.Module):
    """Layer norm of every head: y = scale (o - mean) / sqrt(variance + epsilon) + bias, a group norm.

    Each channel has a scale of its own, and a bias unless `bias` is False. Computes and returns float32; the heads are joined.
    """

    def __init__(self, heads: int, size: int, *, epsilon: float, bias: bool = True, rngs: nnx.Rngs):
        self.epsilon = epsilon
        own = {"axes": ("heads",), **NO_DECAY}
        self.scale = parameter(rngs, nnx.initializers.ones_init(), (heads * size,), **own)
        self.bias = parameter(rngs, nnx.initializers.zeros_init(), (heads * size,), **own) if bias else None

    def __call__(self, o: Float[Array, "b t h v"]) -> Float[Array, "b t d"]:
        """Returns the heads, normalized and joined."""
        y = o.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = join_heads(y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon))
        y = y * self.scale[...][None, None]
        return y if self.bias is None else y + self.bias[...][None, None]
