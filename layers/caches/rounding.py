"""Numbers rounded to a few bits, several of them in a byte."""

from typing import NamedTuple

import jax.numpy as jnp

from layers.typing import Array, Float, Integer


class Rounded(NamedTuple):
    """Numbers rounded to steps between the smallest and the largest of a group.

        x = least + step code,   code in 0 ... 2^bits - 1

    Attributes:
      codes: 8 / bits numbers per byte along the last axis.
      least, step: per group; they broadcast against numbers whose axes are cut into groups.
    """

    codes: Integer[Array, "..."]
    least: Float[Array, "..."]
    step: Float[Array, "..."]


def round_to(x: Float[Array, "... n"], bits: int, axis: int) -> Rounded:
    """Returns numbers rounded to 2, 4 or 8 bits, with groups along an axis; halves go to even codes.

    least = min x,   step = (max x - min x) / (2^bits - 1),   code = round((x - least) / step)
    """
    x = x.astype(jnp.float32)
    least, most = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    step = (most - least) / (2**bits - 1)
    codes = jnp.round((x - least) / jnp.where(step == 0, 1.0, step)).astype(jnp.uint8)
    return Rounded(packed(codes, bits), least, step)


def restored(x: Rounded, bits: int) -> Float[Array, "... n"]:
    """Returns the numbers that codes stand for, float32."""
    return x.least + x.step * unpacked(x.codes, bits).astype(jnp.float32)


def packed(codes: Integer[Array, "... n"], bits: int) -> Integer[Array, "... m"]:
    """Returns codes of so many bits, 8 / bits of them in a byte, the first in the lowest bits."""
    each = 8 // bits
    parts = codes.reshape(*codes.shape[:-1], codes.shape[-1] // each, each)
    return (parts << _shifts(bits, parts.ndim)).sum(-1, dtype=jnp.uint8)


def unpacked(codes: Integer[Array, "... m"], bits: int) -> Integer[Array, "... n"]:
    """Returns the codes that bytes hold."""
    each = 8 // bits
    parts = (codes[..., None] >> _shifts(bits, codes.ndim + 1)) & jnp.uint8(2**bits - 1)
    return parts.reshape(*codes.shape[:-1], codes.shape[-1] * each)


def _shifts(bits, rank):
    """How far the codes in a byte are from its end, along the last of so many axes."""
    return (jnp.arange(8 // bits, dtype=jnp.uint8) * bits).reshape((1,) * (rank - 1) + (-1,))
