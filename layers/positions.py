"""Encodings of position."""

import jax.numpy as jnp

from layers.typing import Array, Float, Int


def rotary(
    x: Float[Array, "b t h k"], positions: Int[Array, "#b t"], base: float = 10_000.0
) -> Float[Array, "b t h k"]:
    """RoPE (Su et al. 2021, arXiv:2104.09864): turns the pair (x_i, x_{i + k/2}) by the angle position * base^(-2i/k).

    Args:
      x: queries or keys; k is even.
      positions: of the tokens, from 0; an axis of size 1 stands for all rows.
      base: the slowest pair turns once in about 2 pi base tokens.

    Raises:
      ValueError: k is odd.
    """
    size = x.shape[-1]
    if size % 2:
        raise ValueError(f"rotary positions need an even head size, got {size}")
    frequency = base ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
