"""Heads of recurrent mixers: their sizes, their matrix memory and what it carries, the norm and the gate behind them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layers.kernels.gated_linear_attention import gated_linear_attention
from layers.kernels.segments import SegmentIds
from layers.parameters import NO_DECAY, parameter
from layers.parts.carry import continues, enter, next_segment
from layers.typing import Array, Float, Int

GATES = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}


class MemoryState(NamedTuple):
    """The matrix memory of every head, float32, and the segment that it belongs to."""

    memory: Float[Array, "b h k v"]
    segment: Int[Array, "b"]


def head_size(field: str, given: int | None, config: Any, part: float = 1.0) -> int:
    """Features of a head: as given, or an equal share of `part * config.width` for each of `config.heads`.

    Raises:
      ValueError: the share is not a whole number, or what is given (or heads) is below 1; names the config's field.
    """
    if config.heads < 1:
        raise ValueError(f"heads={config.heads}; expected at least 1")
    if given is not None:
        if given < 1:
            raise ValueError(f"{field}={given}; expected at least 1")
        return given
    size = part * config.width / config.heads
    if size < 1 or not size.is_integer():
        raise ValueError(
            f"heads={config.heads} cannot share {part:g} x width={config.width} equally; "
            f"choose heads that do, or set {field}"
        )
    return int(size)


def shared_heads(config: Any) -> int:
    """Key/value heads of a config: `kv_heads`, or as many as `heads`.

    Raises:
      ValueError: they do not divide the heads.
    """
    if config.kv_heads is None:
        return config.heads
    if config.kv_heads < 1 or config.heads % config.kv_heads:
        raise ValueError(f"kv_heads={config.kv_heads} does not divide heads={config.heads}")
    return config.kv_heads


def multiplied_heads(config: Any) -> int:
    """Value heads of a config: `value_heads`, or as many as `heads`.

    Raises:
      ValueError: they are no multiple of the heads.
    """
    if config.value_heads is None:
        return config.heads
    if config.value_heads < 1 or config.value_heads % config.heads:
        raise ValueError(f"value_heads={config.value_heads} is not a multiple of heads={config.heads}")
    return config.value_heads


def split_heads(x: Float[Array, "b t d"], heads: int) -> Float[Array, "b t h k"]:
    """Features cut into heads, head by head."""
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads)


def join_heads(x: Float[Array, "b t h k"]) -> Float[Array, "b t d"]:
    """The reverse of `split_heads`."""
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3])


def remember(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t g v"],
    state: MemoryState | None,
    *,
    segment_ids: SegmentIds,
    **options: Any,
) -> tuple[Float[Array, "b t h v"], MemoryState | None]:
    """`gated_linear_attention` with these options, from and to the state of a mixer."""
    before = None if state is None else enter(state.memory, continues(state.segment, segment_ids))
    o, memory = gated_linear_attention(q, k, v, initial_state=before, segment_ids=segment_ids, **options)
    if state is None:
        return o, None
    return o, MemoryState(memory, next_segment(state.segment, segment_ids, q.shape[1]))


class HeadNorm(nnx.Module):
    """Norm and gate behind the heads: y = scale o / sqrt(mean(o^2) + epsilon) * activation(gate), float32 inside.

    The mean is over the features of a head and all heads share one scale.

    Args:
      size: features of a head.
      gate: activation of the gate, "silu" or "sigmoid"; None for no gate.
      affine: whether there is a scale.
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
        """The heads, normalised, gated and joined."""
        y = o.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        if self.scale is not None:
            y = y * self.scale[...][None, None, None]
        y = join_heads(y)
        if self.gate is not None:
            y = y * GATES[self.gate](gate.astype(jnp.float32))
        return y.astype(self.dtype)


class HeadLayerNorm(nnx.Module):
    """y = scale (o - mean) / sqrt(variance + epsilon) + bias by head, a group norm; every channel has a scale and bias.

    float32 inside and out; heads come out joined.
    """

    def __init__(self, heads: int, size: int, *, epsilon: float, rngs: nnx.Rngs):
        self.epsilon = epsilon
        self.scale = parameter(rngs, nnx.initializers.ones_init(), (heads * size,), **NO_DECAY)
        self.bias = parameter(rngs, nnx.initializers.zeros_init(), (heads * size,), **NO_DECAY)

    def __call__(self, o: Float[Array, "b t h v"]) -> Float[Array, "b t d"]:
        """The heads, normalised and joined."""
        y = o.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = join_heads(y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon))
        return y * self.scale[...][None, None] + self.bias[...][None, None]
